"""Estimates of a run's memory, disk and time before anything is loaded."""
