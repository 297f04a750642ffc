"""Linen's layers as NNX modules, and the table of how the layers of the two differ."""

from nnx_bridge.compat._difference import Difference
from nnx_bridge.compat._differences import DIFFERENCES, difference

__all__ = ["DIFFERENCES", "Difference", "difference"]
