"""Scoring of a model, with or without adapters, on tasks: protocols, batching over processes, results on disk."""
