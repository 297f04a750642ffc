"""Linen's lifted transforms, with Linen's signatures, on NNX."""

from flax.linen import PARTITION_NAME, broadcast
from flax.typing import In, Out

from nnx_bridge.transforms._branches import cond, switch
from nnx_bridge.transforms._custom_vjp import custom_vjp
from nnx_bridge.transforms._fold_rngs import fold_rngs
from nnx_bridge.transforms._jit import jit
from nnx_bridge.transforms._map_variables import add_metadata_axis, map_variables
from nnx_bridge.transforms._named_call import named_call
from nnx_bridge.transforms._remat import checkpoint, remat, remat_scan
from nnx_bridge.transforms._scan import scan
from nnx_bridge.transforms._vmap import vmap
from nnx_bridge.transforms._while_loop import while_loop

__all__ = [
    "PARTITION_NAME",
    "In",
    "Out",
    "add_metadata_axis",
    "broadcast",
    "checkpoint",
    "cond",
    "custom_vjp",
    "fold_rngs",
    "jit",
    "map_variables",
    "named_call",
    "remat",
    "remat_scan",
    "scan",
    "switch",
    "vmap",
    "while_loop",
]
