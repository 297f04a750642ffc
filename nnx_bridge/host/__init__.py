"""A Linen module as a tree of NNX modules that runs the Linen program."""

from nnx_bridge.host._host import Host, check_linen_module, check_variables
from nnx_bridge.host._interventions import Method
from nnx_bridge.host._node import Node
from nnx_bridge.host._program import default_mutable
from nnx_bridge.host._unhost import unhost

__all__ = [
    "Host",
    "Method",
    "Node",
    "check_linen_module",
    "check_variables",
    "default_mutable",
    "unhost",
]
