"""Whether two programs compute the same, and a report that says where they do not."""

from nnx_bridge.equivalence._case import Case, CaseError, load_case
from nnx_bridge.equivalence._check import check
from nnx_bridge.equivalence._report import Report, Row, Verdict

__all__ = ["Case", "CaseError", "Report", "Row", "Verdict", "check", "load_case"]
