"""What would be the same for any model: loop, optimizers, checkpoints, settings, logging."""
