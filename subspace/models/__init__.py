"""The frozen base model: its files, loading, quantised weights, and output head."""
