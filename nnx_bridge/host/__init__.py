"""A Linen module as a tree of NNX modules that runs the Linen program."""

from nnx_bridge.host._host import Host, check_variables
from nnx_bridge.host._node import Node
from nnx_bridge.host._unhost import unhost

__all__ = ["Host", "Node", "check_variables", "unhost"]
