"""The experts of mixtures, as transformers holds their weights."""
