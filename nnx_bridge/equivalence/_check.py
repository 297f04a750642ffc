"""Whether a Linen module is the same program under `lifted`, and hosted as NNX.

One call of the module is computed three ways, each compiled: by raw JAX over the pure function
`module.apply`, which is the reference; by `lifted` on the bound Linen module; and by `lifted` on
the module hosted as NNX. Each way runs three times: the call alone, reverse mode (the gradient of
a random combination of the outputs), and forward mode (the derivative in one random direction of
all parameters and inputs). After each the changed collections are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import nnx

import lifted
from nnx_bridge._collections import to_variables
from nnx_bridge.equivalence._case import Case
from nnx_bridge.equivalence._problem import (
    Arrays,
    Data,
    Problem,
    by_path,
    combine,
    failure,
    first_line,
    inexact,
)
from nnx_bridge.equivalence._report import Report, Row, compare_arrays, raised
from nnx_bridge.host import Host, unhost

Results = dict[str, Arrays]
Program = Callable[[str], Results]  # From the name of a stage.

STAGES = ("call", "gradient", "jvp")
STEPS = 1 + 3 * len(STAGES)


def check(case: Case, *, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Compares a Linen module with itself under `lifted`, and hosted as NNX.

    Args:
      case: The module and one call of it.
      seed: Where parameters, keys, output weights and directions come from.
      progress: Called with what begins, `STEPS` times.

    Returns:
      A report with a row for each array of each of the two programs.

    Raises:
      CaseError: The module does not run, or there is nothing to differentiate.

    Example:
        >>> from flax import linen as nn
        >>> report = check(Case(nn.Dense(3), (np.ones((2, 4), np.float32),)))
        >>> report.agrees
        True
    """
    progress("initialise")
    problem = Problem.make(case, seed)
    raw = _Raw(problem)
    reference: dict[str, Results] = {}
    skipped: list[str] = []
    for stage in STAGES:
        progress(f"{stage}: raw JAX")
        try:
            reference[stage] = raw(stage)
        except Exception as error:
            if stage != "jvp":
                raise failure(f"the {stage} of {case.name} in raw JAX", error) from error
            # A module with a custom_vjp, for one, has no forward mode.
            skipped.append(f"{stage}, which raw JAX refuses too: {first_line(error)}")
    programs = {"lifted on Linen": _Linen(problem), "lifted on NNX": _Hosted(problem)}
    rows: list[Row] = []
    for route, program in programs.items():
        for stage in STAGES:
            progress(f"{stage}: {route}")
            if stage in reference:
                rows.extend(_rows(program, route, stage, reference[stage]))
    versions = {package: version(package) for package in ("flax", "jax")}
    order = list(dict.fromkeys(row.what for row in rows))
    rows.sort(key=lambda row: order.index(row.what))
    return Report(case.name, tuple(rows), seed, versions, tuple(skipped))


def _rows(program: Program, route: str, stage: str, reference: Results) -> Iterator[Row]:
    try:
        results = program(stage)
    except Exception as error:
        yield from (raised(what, route, error) for what, arrays in reference.items() if arrays)
        return
    for what, arrays in reference.items():
        yield from compare_arrays(what, route, results[what], arrays)


class _Raw:
    """`module.apply` under `jax.grad` and `jax.jvp`."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, stage: str) -> Results:
        return jax.jit(getattr(self, stage))(self._problem.data)

    def call(self, data: Data) -> Results:
        outputs, state = self._problem.apply(data, data.variables, data.primals)
        return {"output": outputs, "state": state}

    def gradient(self, data: Data) -> Results:
        def loss(parameters: Any, primals: Arrays) -> tuple[jax.Array, Arrays]:
            outputs, state = self._apply(data, parameters, primals)
            return combine(outputs, data.weights), state

        grad = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
        (parameters, inputs), state = grad(data.parameters, data.primals)
        return {**_gradients({"params": parameters}, inputs), "state after gradient": state}

    def jvp(self, data: Data) -> Results:
        def outputs(parameters: Any, primals: Arrays) -> tuple[Arrays, Arrays]:
            outputs, state = self._apply(data, parameters, primals)
            return inexact(outputs), state

        primals = (data.parameters, data.primals)
        tangents = jax.tree.map(_full, primals, (data.parameter_tangents, data.input_tangents))
        _, dots, state = jax.jvp(outputs, primals, tangents, has_aux=True)
        return {"output tangent": dots, "state after jvp": state}

    def _apply(self, data: Data, parameters: Any, primals: Arrays) -> tuple[Arrays, Arrays]:
        variables = dict(data.variables)
        if "params" in variables:
            variables["params"] = parameters
        return self._problem.apply(data, variables, primals)


class _Linen:
    """`lifted` on the bound Linen module."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, stage: str) -> Results:
        p = self._problem

        def program(data: Data) -> Results:
            module = p.case.module.bind(data.variables, rngs=data.keys, mutable=p.mutable)
            results: Results = getattr(self, stage)(module, data)
            return {**results, _state_after(stage): p.changeable(module.unbind()[1])}

        return jax.jit(program)(p.data)

    def call(self, module: Any, data: Data) -> Results:
        return {"output": self._outputs(module, data, data.primals)}

    def gradient(self, module: Any, data: Data) -> Results:
        def loss(mdl: Any, primals: Arrays) -> jax.Array:
            return combine(self._outputs(mdl, data, primals), data.weights)

        if not self._problem.has_parameters:
            (inputs,) = lifted.grad(loss, module, data.primals)
            return _gradients({}, inputs)
        parameters, inputs = lifted.grad(loss, module, data.primals, grad_variables="params")
        return _gradients(parameters, inputs)

    def jvp(self, module: Any, data: Data) -> Results:
        def outputs(mdl: Any, primals: Arrays) -> Arrays:
            return inexact(self._outputs(mdl, data, primals))

        has_parameters = self._problem.has_parameters
        tangents = {"params": data.parameter_tangents} if has_parameters else {}
        _, dots = lifted.jvp(outputs, module, (data.primals,), (data.input_tangents,), tangents)
        return {"output tangent": dots}

    def _outputs(self, module: Any, data: Data, primals: Arrays) -> Arrays:
        def run(*args: Any, **kwargs: Any) -> Any:
            method = self._problem.case.method or "__call__"
            if isinstance(method, str):
                return getattr(module, method)(*args, **kwargs)
            return method(module, *args, **kwargs)

        return self._problem.run(run, data, primals)


class _Hosted(_Linen):
    """`lifted` on the host, an NNX module, under `nnx.jit`."""

    def __call__(self, stage: str) -> Results:
        p = self._problem
        model = Host(p.case.module, p.data.variables, mutable=p.mutable)
        # The model holds the variables; what it left as it was must not come from elsewhere.
        data = p.data._replace(variables={})
        results: Results = nnx.jit(getattr(self, stage))(model, data)
        return {**results, _state_after(stage): p.changeable(unhost(model)[1])}

    def _outputs(self, module: Any, data: Data, primals: Arrays) -> Arrays:
        def run(*args: Any, **kwargs: Any) -> Any:
            return module(*args, rngs=data.keys, method=self._problem.case.method, **kwargs)

        return self._problem.run(run, data, primals)


def _gradients(parameters: Any, inputs: Arrays) -> Results:
    if isinstance(parameters, nnx.State):
        parameters = to_variables(parameters)
    return {
        "input gradient": inexact(inputs),
        "parameter gradient": inexact(by_path(parameters)),
    }


def _state_after(stage: str) -> str:
    return "state" if stage == "call" else f"state after {stage}"


def _full(primal: Any, tangent: Any) -> Any:
    """The tangent that raw JAX demands, also of what has no direction."""
    return np.zeros(np.shape(primal), jax.dtypes.float0) if tangent is None else tangent
