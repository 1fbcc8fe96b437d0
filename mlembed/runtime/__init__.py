"""Files, cache, checkpoints, processes, logs and errors."""
