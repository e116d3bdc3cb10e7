"""Training: run, step, loop, validation, checkpoints, metrics."""
