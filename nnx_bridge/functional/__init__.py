"""The functionaliser of NNX: modules as pure functions of their Variables."""

from nnx_bridge.functional._group import NNXGroup

__all__ = ["NNXGroup"]
