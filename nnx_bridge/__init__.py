"""From Flax Linen to Flax NNX: collections, a host for Linen modules, and proofs of equality."""
