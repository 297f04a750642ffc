"""From Flax Linen to Flax NNX: collections, a host for Linen modules, and proofs of equality."""

import nnx_bridge._functional  # noqa: F401  (makes NNX modules known to lifted)
from nnx_bridge._capture import capture
from nnx_bridge._capture_derivatives import (
    CapturedGrad,
    CapturedJvp,
    capture_grad,
    capture_jvp,
)
from nnx_bridge._case import Case, CaseError, load_case
from nnx_bridge._collections import collection_name, to_state, to_variables, variable_type
from nnx_bridge._equivalence import check
from nnx_bridge._host import Host, unhost
from nnx_bridge._report import Report, Row, Verdict
from nnx_bridge._tree import Node

__all__ = [
    "CapturedGrad",
    "CapturedJvp",
    "Case",
    "CaseError",
    "Host",
    "Node",
    "Report",
    "Row",
    "Verdict",
    "capture",
    "capture_grad",
    "capture_jvp",
    "check",
    "collection_name",
    "load_case",
    "to_state",
    "to_variables",
    "unhost",
    "variable_type",
]
