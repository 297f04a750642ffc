"""Whether two models compute the same, and a report that says where they do not."""

from nnx_bridge.equivalence._case import Case, CaseError, load_case
from nnx_bridge.equivalence._check import check
from nnx_bridge.equivalence._compare import assert_equivalent, compare
from nnx_bridge.equivalence._correspondence import Correspondence
from nnx_bridge.equivalence._inputs import Random
from nnx_bridge.equivalence._parting import Parting
from nnx_bridge.equivalence._report import Report
from nnx_bridge.equivalence._verdict import Element, Row, Verdict

__all__ = [
    "Case",
    "CaseError",
    "Correspondence",
    "Element",
    "Parting",
    "Random",
    "Report",
    "Row",
    "Verdict",
    "assert_equivalent",
    "check",
    "compare",
    "load_case",
]
