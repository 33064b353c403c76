"""Other projects' entry points to a run's model."""
