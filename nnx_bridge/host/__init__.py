"""A Linen module as a tree of NNX modules that runs the Linen program."""

from nnx_bridge.host._host import Host, unhost
from nnx_bridge.host._node import Node

__all__ = ["Host", "Node", "unhost"]
