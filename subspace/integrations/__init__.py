"""Interfaces of other projects to a run's model."""
