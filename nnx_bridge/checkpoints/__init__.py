"""Checkpoints of Linen as checkpoints of NNX, and back."""

from nnx_bridge.checkpoints._convert import Conversion, convert
from nnx_bridge.checkpoints._describe import ArrayDescription, Description, describe
from nnx_bridge.checkpoints._entries import CheckpointError
from nnx_bridge.checkpoints._layout import LAYOUTS
from nnx_bridge.checkpoints._live import from_train_state, load_checkpoint, to_train_state

__all__ = [
    "ArrayDescription",
    "LAYOUTS",
    "CheckpointError",
    "Conversion",
    "Description",
    "convert",
    "describe",
    "from_train_state",
    "load_checkpoint",
    "to_train_state",
]
