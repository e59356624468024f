"""Run folders on disk: records, ledger, shards, merged runs, what may be deleted."""
