"""Model-independent functions that reduce a training step's time or memory, each with its measured gain."""
