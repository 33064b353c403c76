"""Processes and DeepSpeed: collectives, sharded parameters, engine and configuration, launcher, signals, watchdog."""
