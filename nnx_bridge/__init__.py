"""From Flax Linen to Flax NNX: collections, a host for Linen modules, and proofs of equality."""

import nnx_bridge.functional  # noqa: F401  (makes NNX modules known to lifted)
from nnx_bridge import audit, compat
from nnx_bridge._collections import collection_name, to_state, to_variables, variable_type
from nnx_bridge._linen_rngs import linen_key, linen_rngs
from nnx_bridge.captures import CapturedGrad, CapturedJvp, capture, capture_grad, capture_jvp
from nnx_bridge.checkpoints import (
    CheckpointError,
    Conversion,
    convert,
    from_train_state,
    load_checkpoint,
    to_train_state,
)
from nnx_bridge.equivalence import (
    Case,
    CaseError,
    Parting,
    Random,
    Report,
    Row,
    Verdict,
    assert_equivalent,
    check,
    compare,
    load_case,
)
from nnx_bridge.host import Host, Node, check_variables, unhost
from nnx_bridge.weights import Plan, Rule, WeightsError, load, match, register_layout

__all__ = [
    "CapturedGrad",
    "CapturedJvp",
    "Case",
    "CaseError",
    "CheckpointError",
    "Conversion",
    "Host",
    "Node",
    "Parting",
    "Plan",
    "Random",
    "Report",
    "Row",
    "Rule",
    "Verdict",
    "WeightsError",
    "assert_equivalent",
    "audit",
    "capture",
    "capture_grad",
    "capture_jvp",
    "check",
    "check_variables",
    "collection_name",
    "compare",
    "compat",
    "convert",
    "from_train_state",
    "linen_key",
    "linen_rngs",
    "load",
    "load_case",
    "load_checkpoint",
    "match",
    "register_layout",
    "to_state",
    "to_train_state",
    "to_variables",
    "unhost",
    "variable_type",
]
