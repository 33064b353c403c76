"""Training: one loop for every method, optimizers, checkpoints, resume, logging, health checks."""
