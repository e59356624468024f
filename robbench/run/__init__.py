"""A run: plan, cells, executor, shards of work, Ray workers, progress."""
