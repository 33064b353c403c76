"""What leaves for other libraries: their ways of saving a model with adapters, and folders of merged models."""
