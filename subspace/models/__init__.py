"""A model from disk, frozen: its files, its loading, its quantised weights, and its output head."""
