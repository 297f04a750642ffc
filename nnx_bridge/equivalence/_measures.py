"""What is measured of a model: results of one call, of its derivatives, and of several steps.

A stage is one compiled program. Its results are arrays by their paths, under words for what they
are; the words are those of the rows of a report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Set
from typing import Any

import jax
import numpy as np
import optax

from nnx_bridge._collections import Variables
from nnx_bridge.equivalence._arrays import Arrays, by_path, inexact, with_values
from nnx_bridge.equivalence._calls import PARTS, RAN, Call, Calls
from nnx_bridge.equivalence._correspondence import Correspondence, merged, unboxed
from nnx_bridge.equivalence._exact import QUICKLY, Exact, promote
from nnx_bridge.equivalence._problem import OWN, STAGES, Data, Problem, combine
from nnx_bridge.equivalence._recording import Recorder
from nnx_bridge.equivalence._sides import Arguments, Run, Side
from nnx_bridge.equivalence._tags import hoisted

Results = dict[str, Any]
Program = Callable[[str, Data], Results]  # From the name of a stage.

# What belongs to calls of modules, and may have steps.
_RECORDED = {*PARTS.values(), *(f"{what} gradient" for what in PARTS.values())}

# What later steps start from; no arrays to compare.
AFTER = "variables after the call"


class Raw:
    """`jax.grad` and `jax.jvp` over the pure function of a side, with the reference's variables.

    Args:
      problem: The problem.
      side: The model; by default the reference of the problem.
      correspondence: How its variables come from those of the reference.
      recording: Whether calls of modules are recorded, and draws counted the same for all models.

    Attributes:
      failed: The module that the last error passed through first.
    """

    def __init__(
        self,
        problem: Problem,
        side: Side | None = None,
        correspondence: Correspondence | None = None,
        recording: bool = False,
    ) -> None:
        self._problem, self._side = problem, side or problem.side
        self._correspondence, self._recording = correspondence, recording
        self._calls = Calls(())
        self.failed: str | None = None
        options = QUICKLY if recording else None
        self._compiled = {
            stage: jax.jit(getattr(self, stage), compiler_options=options) for stage in STAGES
        }

    def __call__(self, stage: str, data: Data) -> Results:
        return self.split(self._compiled[stage](data))

    @property
    def calls(self) -> dict[str, Call]:
        """The calls of modules in the order in which they end; known once a stage has run."""
        return self._calls.calls

    @property
    def sown(self) -> tuple[str, ...]:
        """The names of what is sown."""
        return self._calls.sown

    def split(self, results: Results) -> Results:
        """The results with what is recorded of each step of a loop."""
        ran = results.get(RAN, {})
        layers = {
            what: self._calls.split(what.removesuffix(" gradient"), results[what], ran)
            for what in _RECORDED & {*results}
        }
        return {what: x for what, x in {**results, **layers}.items() if what != RAN}

    def exact(self, data: Data) -> Program:
        """The same programs in float64, and the precision of their results."""
        return _ExactProgram(self, data)

    def call(self, data: Data) -> Results:
        def run(data: Data) -> Results:
            outputs, after = self._run(data, data.variables, data.primals)
            return {"output": outputs, "state": self._problem.changeable(after), AFTER: after}

        if not self._recording:
            results = run(data)
            return {what: results[what] for what in ("output", "state")}
        results, found = hoisted(run, data)
        self._calls = Calls(found)
        parameters = by_path({"params": results[AFTER].get("params", {})})
        return {**self._calls.arrays(found), **results, "parameter after the call": parameters}

    def gradient(self, data: Data) -> Results:
        def loss(parameters: Any, primals: Arrays) -> tuple[jax.Array, Any]:
            outputs, after = self._run(data, _with_parameters(data, parameters), primals)
            return combine(outputs, data.weights), (outputs, after)

        def run(data: Data) -> Results:
            grad = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
            (parameters, inputs), (outputs, after) = grad(data.parameters, data.primals)
            return {
                "input gradient": inexact(inputs),
                "parameter gradient": inexact(by_path({"params": parameters})),
                "state after gradient": self._problem.changeable(after),
                "output with gradient": outputs,
                AFTER: after,
            }

        if not self._recording:
            return run(data)
        results, found = hoisted(run, data)
        gradients = self._calls.gradients(found)
        ran = {RAN: gradients.pop(RAN)}
        return {**{f"{what} gradient": x for what, x in gradients.items()}, **ran, **results}

    def jvp(self, data: Data) -> Results:
        def outputs(parameters: Any, primals: Arrays) -> tuple[Arrays, Arrays]:
            variables = _with_parameters(data, parameters)
            outputs, after = self._run(data, variables, primals)
            return inexact(outputs), self._problem.changeable(after)

        primals = (data.parameters, data.primals)
        tangents = jax.tree.map(_full, primals, (data.parameter_tangents, data.input_tangents))
        _, dots, state = jax.jvp(outputs, primals, tangents, has_aux=True)
        return {"output tangent": dots, "state after jvp": state}

    def _run(self, data: Data, variables: Variables, primals: Arrays) -> tuple[Arrays, Variables]:
        recorder = Recorder() if self._recording else None
        # Not the keys by which Linen tells its streams apart: a rewrite may have others.
        draws = next(iter(data.keys.values()), None) if self._recording else None
        own, after = variables, variables
        if self._correspondence is not None:
            shared = {name: tree for name, tree in variables.items() if name != OWN}
            values = self._correspondence.to_model(unboxed(shared))
            own = merged(merged(self._side.variables, variables.get(OWN, {})), values)

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal after
            output, after = self._side(
                own, Arguments(args, kwargs), Run(data.keys, draws, recorder)
            )
            return output

        try:
            outputs = self._problem.run(run, data, primals)
        finally:
            if recorder is not None:
                self.failed = recorder.failed
        if self._correspondence is not None:
            state = {name: tree for name, tree in after.items() if name != "params"}
            values = self._correspondence.to_reference(after)
            after = {**merged(unboxed(variables), values), OWN: state}
        return outputs, after


class _ExactProgram:
    """The stages of a program in float64.

    Attributes:
      precisions: For each stage that has run, the precision behind each result.
    """

    def __init__(self, raw: Raw, data: Data) -> None:
        self._raw, self._data = raw, data
        self._exact: dict[str, Exact] = {}
        self.precisions: dict[str, Results] = {}

    def __call__(self, stage: str, data: Data) -> Results:
        if stage not in self._exact:
            self._exact[stage] = Exact(getattr(self._raw, stage), self._data)
        results = self._raw.split(self._exact[stage](data))
        self.precisions[stage] = self._raw.split(self._exact[stage].precision)
        return results

    def rounded(self, stage: str) -> frozenset[Any]:
        """The constants in a stage that has run which may have been rounded; see `Exact`."""
        return self._exact[stage].rounded

    def moved(self, stage: str, data: Data, constants: Set[Any], seed: int) -> Results:
        """A stage that has run, with some of these constants moved by half a rounding."""
        return self._raw.split(self._exact[stage].moved(data, constants, seed))


def steps(
    program: Program,
    first: Data,
    problem: Problem,
    seed: int,
    number: int,
    optimizer: optax.GradientTransformation,
    stage: str,
) -> Iterator[Results]:
    """The results of several steps of training, each with what it leaves.

    Args:
      program: The program of a model.
      first: The data of the first step.
      problem: The problem.
      seed: Where the inputs of later steps come from.
      number: How many steps there are.
      optimizer: What moves the parameters.
      stage: The stage to run: "gradient", or "call" where there is none, and nothing moves them.
    """
    data, state = first, None
    for step in range(number):
        results = program(stage, data)
        outputs = results["output" if stage == "call" else "output with gradient"]
        changed = {f"output, step {step + 1}": outputs} if step else {}
        variables = dict(results[AFTER])
        if step:
            changed[f"state, step {step + 1}"] = problem.changeable(variables)
        gradients = results.get("parameter gradient", {})
        if gradients:
            own = by_path({"params": data.parameters})
            parameters = {path: own[path] for path in gradients}
            state = optimizer.init(parameters) if state is None else state
            parameters, state = _update(optimizer, gradients, state, parameters)
            variables["params"] = with_values({"params": data.parameters}, parameters)["params"]
            changed[f"parameter, step {step + 1}"] = parameters
        yield changed
        data = problem.after(first, seed, step + 1)._replace(variables=variables)


def wide(data: Data) -> Data:
    """The data in float64; inside of `jax.enable_x64` only."""
    return jax.tree.map(promote, data)


@functools.partial(jax.jit, static_argnums=0)
def _update(
    optimizer: optax.GradientTransformation, gradients: Arrays, state: Any, parameters: Arrays
) -> tuple[Arrays, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    moved: Any = optax.apply_updates(parameters, updates)
    return moved, state


def _with_parameters(data: Data, parameters: Any) -> Variables:
    return {**data.variables, **({"params": parameters} if "params" in data.variables else {})}


def _full(primal: Any, tangent: Any) -> Any:
    """The tangent that raw JAX demands, also of what has no direction."""
    return np.zeros(np.shape(primal), jax.dtypes.float0) if tangent is None else tangent
