"""What moving a Linen model, or a package of them, to NNX takes."""

from nnx_bridge.audit._findings import Audit, Finding, ModuleClass
from nnx_bridge.audit._inspect import inspect

__all__ = ["Audit", "Finding", "ModuleClass", "inspect"]
