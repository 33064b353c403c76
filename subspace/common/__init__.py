"""What knows nothing of models: files, downloads, paths, progress, tables, and how settings are declared."""
