"""Which results of a program depend on which of its arguments."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal


def varying_outputs(program: ClosedJaxpr, varies: Sequence[bool]) -> list[bool]:
    """Whether each result depends on an argument that ``varies``.

    What an equation computes counts as depending on all that goes into it.
    """
    jaxpr = program.jaxpr
    varying = {var for var, v in zip(jaxpr.invars, varies, strict=True) if v}

    def depends(variables: Sequence[Any]) -> bool:
        return any(not isinstance(v, Literal) and v in varying for v in variables)

    for equation in jaxpr.eqns:
        if depends(equation.invars):
            varying.update(equation.outvars)
    return [depends([var]) for var in jaxpr.outvars]
