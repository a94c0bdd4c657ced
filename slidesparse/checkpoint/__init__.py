"""Weights on disk: sources, prepare (quantise), convert (prune, prove), and reading them back."""
