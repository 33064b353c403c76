"""Adapters at the experts of a mixture, which transformers 5 keeps as parameters of three dimensions.

``adapter`` runs a method at every matrix of a stack (``models.experts.weights``), ``products`` is
what the model's own code multiplies by in a stack's place.
"""
