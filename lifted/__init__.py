"""JAX transforms that know the variables of Flax modules.

The transforms take a function ``fn(mdl, *primals)`` and a target ``mdl``: a bound Linen module, a
`flax.core.Scope`, an NNX module, or a pytree of these. They differentiate with respect to primals
and variables, and write what ``fn`` wrote.
"""

from lifted._forward import jvp, linearize
from lifted._functional import Functional, functionalize
from lifted._hvp import hvp
from lifted._jacobian import hessian, jacfwd, jacrev
from lifted._linen import LinenGroup as _LinenGroup  # noqa: F401  (registers Linen)
from lifted._reverse import grad, value_and_grad, vjp

__all__ = [
    "Functional",
    "functionalize",
    "grad",
    "hessian",
    "hvp",
    "jacfwd",
    "jacrev",
    "jvp",
    "linearize",
    "value_and_grad",
    "vjp",
]
