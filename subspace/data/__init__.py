"""Tasks, mixtures and a user's own files: preparation, verification, tokenisation, and the batches of each step."""
