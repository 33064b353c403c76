"""One training loop for every method: steps, optimizers, checkpoints, resume, logging, health checks."""
