"""Utilities that know nothing of models: files, downloads, paths, progress, tables, and the declaration of settings."""
