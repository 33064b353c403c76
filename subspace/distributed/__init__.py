"""Processes and DeepSpeed: collectives, sharded parameters, the engine and its configuration, launcher, signals."""
