"""Linen's layers as NNX modules, and the table of how the layers of the two differ."""

from nnx_bridge.compat._attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
)
from nnx_bridge.compat._conv import ConvLocal, ConvLSTMCell
from nnx_bridge.compat._difference import Difference
from nnx_bridge.compat._differences import DIFFERENCES, difference
from nnx_bridge.compat._fp8 import (
    Fp8DirectDotGeneralOp,
    Fp8DotGeneral,
    Fp8DotGeneralOp,
    Fp8Einsum,
    NANOOFp8DotGeneralOp,
)
from nnx_bridge.compat._normalization import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
)
from nnx_bridge.compat._plain import BatchApply, Dropout, Sequential
from nnx_bridge.compat._recurrent import (
    GRUCell,
    LSTMCell,
    MGUCell,
    OptimizedLSTMCell,
    SimpleCell,
)
from nnx_bridge.compat._reparametrized import SpectralNorm, WeightNorm

__all__ = [
    "DIFFERENCES",
    "BatchApply",
    "BatchNorm",
    "ConvLSTMCell",
    "ConvLocal",
    "Difference",
    "Dropout",
    "Fp8DirectDotGeneralOp",
    "Fp8DotGeneral",
    "Fp8DotGeneralOp",
    "Fp8Einsum",
    "GRUCell",
    "GroupNorm",
    "InstanceNorm",
    "LSTMCell",
    "LayerNorm",
    "MGUCell",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "NANOOFp8DotGeneralOp",
    "OptimizedLSTMCell",
    "RMSNorm",
    "SelfAttention",
    "Sequential",
    "SimpleCell",
    "SpectralNorm",
    "WeightNorm",
    "difference",
]
