"""Weights of Linen models in NNX models that were rewritten by hand, and back."""

from nnx_bridge.weights._layouts import (
    Absent,
    Concatenate,
    Copy,
    Custom,
    Layout,
    Reshape,
    Transpose,
)
from nnx_bridge.weights._leaves import Leaf, Target
from nnx_bridge.weights._load import load
from nnx_bridge.weights._match import match
from nnx_bridge.weights._plan import Plan
from nnx_bridge.weights._problems import Problem, Undecided, WeightsError
from nnx_bridge.weights._registry import Part, register_layout
from nnx_bridge.weights._row import Certainty, Row
from nnx_bridge.weights._rules import Rule
from nnx_bridge.weights._stacked import Stacked

__all__ = [
    "Absent",
    "Certainty",
    "Concatenate",
    "Copy",
    "Custom",
    "Layout",
    "Leaf",
    "Part",
    "Plan",
    "Problem",
    "Reshape",
    "Row",
    "Rule",
    "Stacked",
    "Target",
    "Transpose",
    "Undecided",
    "WeightsError",
    "load",
    "match",
    "register_layout",
]
