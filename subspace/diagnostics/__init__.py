"""What a trained update does to the subspaces of the frozen weights, measured beside what chance would do."""
