"""Layers whose weights, not activations, are dropped."""
