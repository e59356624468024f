"""The matrix: plan -> cells -> shards -> executor -> ledger."""
