"""The smallest thing to check: a Linen MLP with batch statistics.

flaxlift check examples.small_model:mlp
"""
