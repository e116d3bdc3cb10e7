"""How a model is trained: run, step, loop, validation, checkpoints, metrics."""
