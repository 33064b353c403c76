"""Checks of every machine of a run before it starts: one line each, with what to do."""
