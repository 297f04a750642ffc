"""`lifted` as another way to the results of raw JAX: on a bound Linen module, and hosted as NNX."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

import lifted
from nnx_bridge._collections import to_variables
from nnx_bridge.equivalence._arrays import Arrays, by_path, inexact
from nnx_bridge.equivalence._measures import Results
from nnx_bridge.equivalence._problem import Data, Problem, combine
from nnx_bridge.host import Host, check_linen_module, unhost


class LinenRoute:
    """`lifted` on the bound Linen module."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._module = check_linen_module(problem.case.module)

    def __call__(self, stage: str, data: Data) -> Results:
        p = self._problem

        def program(data: Data) -> Results:
            module = self._module.bind(data.variables, rngs=data.keys, mutable=p.mutable)
            results: Results = getattr(self, stage)(module, data)
            return {**results, _state_after(stage): p.changeable(module.unbind()[1])}

        return jax.jit(program)(data)

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


class HostedRoute(LinenRoute):
    """`lifted` on the host, an NNX module, under `nnx.jit`."""

    def __call__(self, stage: str, data: Data) -> Results:
        p = self._problem
        model = Host(self._module, data.variables, mutable=p.mutable)
        # The model holds the variables; what it left as it was must not come from elsewhere.
        data = data._replace(variables={})
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
