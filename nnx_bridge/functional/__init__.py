"""The functionaliser of NNX: modules as pure functions of their Variables."""

from nnx_bridge.functional._filters import Predicate, to_predicate
from nnx_bridge.functional._group import NNXGroup
from nnx_bridge.functional._updates import NNXUpdates, Old, Written

__all__ = ["NNXGroup", "NNXUpdates", "Old", "Predicate", "Written", "to_predicate"]
