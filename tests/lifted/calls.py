"""Every transform as a function of ``fn`` and ``mdl``; the rest of its arguments is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lifted
from tests.helpers import normal

X = normal(4, 3)

CALLS: dict[str, Callable[..., Any]] = {
    "grad": lambda fn, mdl: lifted.grad(fn, mdl, X),
    "value_and_grad": lambda fn, mdl: lifted.value_and_grad(fn, mdl, X),
    "vjp": lambda fn, mdl: lifted.vjp(fn, mdl, X),
    "jvp": lambda fn, mdl: lifted.jvp(fn, mdl, (X,), (X,), {}),
    "linearize": lambda fn, mdl: lifted.linearize(fn, mdl, X),
    "jacfwd": lambda fn, mdl: lifted.jacfwd(fn, mdl, X),
    "jacrev": lambda fn, mdl: lifted.jacrev(fn, mdl, X),
    "hessian": lambda fn, mdl: lifted.hessian(fn, mdl, X),
    "hvp": lambda fn, mdl: lifted.hvp(fn, mdl, (X,), (X,)),
}
every_transform = pytest.mark.parametrize("transform", CALLS.values(), ids=CALLS)
