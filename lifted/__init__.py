"""Lifted automatic differentiation: one call site for Linen modules, scopes and NNX modules."""
