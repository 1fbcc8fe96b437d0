"""Files, caches, checkpoints, processes and logs."""
