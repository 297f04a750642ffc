"""The problem that is posed to every program: calls of a model, their data, and random directions.

All arrays of a problem are arguments of the compiled programs, never constants in them: XLA would
fold constants, and in each program differently.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import CollectionFilter, in_filter

from nnx_bridge._collections import Variables
from nnx_bridge._placement import placed_like
from nnx_bridge._values import map_with_path
from nnx_bridge.equivalence._arrays import Arrays, by_path, inexact, of_outputs, text
from nnx_bridge.equivalence._case import Case, CaseError
from nnx_bridge.equivalence._inputs import drawn, is_random
from nnx_bridge.equivalence._sides import Arguments, LinenSide, NnxSide, Run, Side
from nnx_bridge.host import default_mutable

# What is run of a model: the call, reverse mode, forward mode.
STAGES = ("call", "gradient", "jvp")

# Whose lines say nothing about a model that does not run.
_FRAMEWORKS = {"nnx_bridge", "lifted", "layers", "flax", "jax", "jaxlib", "contextlib", "functools"}

# Where a model keeps its own state from step to step, which the reference may know nothing of.
OWN = "state of the model"

# How far random parameters are from those that they are made of.
_NOISE = 0.1


class Data(NamedTuple):
    """The arrays of a problem."""

    variables: Mapping[str, Any]
    inputs: Arrays
    keys: dict[str, jax.Array]
    weights: Arrays  # Of the outputs, in the scalar whose gradient is taken.
    input_tangents: Arrays
    parameter_tangents: Any  # Like the parameters; None for what has no direction.

    @property
    def primals(self) -> Arrays:
        """The inputs that are differentiated."""
        return inexact(self.inputs)

    @property
    def parameters(self) -> Any:
        """The collection `params`."""
        return self.variables.get("params", {})


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with what it leaves open filled in.

    Attributes:
      case: The case.
      side: The reference of the case.
      mutable: The collections that are compared after a call.
      seed: The first seed.
      data: The data for it.
      uncompared: What cannot be compared, and why.
    """

    case: Case
    side: Side
    mutable: CollectionFilter
    seed: int
    data: Data
    uncompared: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def make(
        cls,
        case: Case,
        seed: int,
        training: bool | None = None,
        variables: Variables | None = None,
    ) -> Problem:
        """Draws what the case leaves to the seed.

        Args:
          case: The case.
          seed: Where variables, inputs, keys and directions come from.
          training: The mode to put the reference in; None for what the case says.
          variables: Those of the case for the seed, where they are known.

        Raises:
          CaseError: The module does not run, or there is nothing to compare.
        """
        arguments = Arguments(**drawn(_arguments(case), seed))
        side: Side
        if isinstance(case.module, nn.Module):
            bare = LinenSide(case.module, {}, False, case.method).in_mode(training, arguments)
            variables = case.variables or variables
            variables = variables or _initialised(case, bare, arguments, case.keys(seed))
            # Zeros that only a derivative asks for; modules of NNX have them while they capture.
            variables = {col: v for col, v in variables.items() if col != "perturbations"}
            mutable = default_mutable(variables) if case.mutable is None else case.mutable
            side = dataclasses.replace(bare, variables=variables, mutable=mutable)
        else:
            side = NnxSide(case.module, case.method).in_mode(training, arguments)
            mutable = default_mutable(side.variables) if case.mutable is None else case.mutable
        problem = cls(case, side, mutable, seed, Data({}, {}, {}, {}, {}, {}))
        return dataclasses.replace(problem, data=problem.drawn(seed))

    def drawn(self, seed: int) -> Data:
        """The data for a seed.

        Raises:
          CaseError: See `make`.
        """
        arguments, keys = drawn(_arguments(self.case), seed), self.case.keys(seed)
        variables, case = self.side.variables, self.case
        if isinstance(self.side, LinenSide) and case.variables is None and seed != self.seed:
            variables = _initialised(case, self.side, Arguments(**arguments), keys)
        if case.randomize:
            variables = _randomized(variables, seed)
        data = Data(variables, by_path(arguments), keys, {}, {}, {})
        try:
            outputs, state = jax.eval_shape(self.apply, data, variables, data.inputs)
        except Exception as error:
            raise failure(f"{case.name} does not run", error) from error
        if not outputs and not state:
            raise CaseError(
                f"{case.name} returns no array, and there is no collection that it may change: "
                "nothing to compare"
            )
        return self._with_directions(data, inexact(outputs), seed)

    def after(self, data: Data, seed: int, step: int) -> Data:
        """The data of a later step: new inputs where they are random, and new keys."""
        inputs = by_path(drawn(_arguments(self.case), seed + 1000 * step))
        keys = {name: jax.random.fold_in(key, step) for name, key in data.keys.items()}
        return data._replace(inputs=inputs, keys=keys)

    def run(self, run: Callable[..., Any], data: Data, primals: Arrays) -> Arrays:
        """The output of a function of the arguments of the call, with these primals in them."""
        arrays = {**data.inputs, **primals}
        arguments = map_with_path(
            lambda keys, leaf: arrays.get(text(keys), leaf), _arguments(self.case), is_random
        )
        outputs, others = of_outputs(run(*arguments["args"], **arguments["kwargs"]))
        self.uncompared.update(others)
        return outputs

    def apply(self, data: Data, variables: Variables, primals: Arrays) -> tuple[Arrays, Arrays]:
        """The pure function of the reference: outputs and changed collections."""
        after: Any = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal after
            output, after = self.side(variables, Arguments(args, kwargs), Run(data.keys))
            return output

        return self.run(run, data, primals), self.changeable(after)

    def changeable(self, variables: Mapping[str, Any]) -> Arrays:
        """The arrays of the collections that the call may change."""
        kept = [n for n in variables if n != OWN and in_filter(self.mutable, n)]
        return by_path({name: variables[name] for name in kept})

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything in the collection `params`."""
        return bool(jax.tree.leaves(self.data.parameters))

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the model has."""
        return STAGES[:1] if self.underivable else STAGES

    @property
    def underivable(self) -> str:
        """Why there is nothing to differentiate; empty where there is."""
        if not self.data.weights:
            return f"{self.case.name} returns no floating point array"
        if not self.data.primals and not self.has_parameters:
            return f"{self.case.name} has neither parameters nor inputs of floating point dtype"
        return ""

    def _with_directions(self, data: Data, outputs: Arrays, seed: int) -> Data:
        random = np.random.default_rng(seed)
        return data._replace(
            weights={path: _direction(x, random) for path, x in outputs.items()},
            input_tangents={path: _direction(x, random) for path, x in data.primals.items()},
            parameter_tangents=jax.tree.map(lambda x: _direction(x, random), data.parameters),
        )


def combine(outputs: Arrays, weights: Arrays) -> jax.Array:
    """A generic combination of the outputs: no symmetry of theirs cancels in it."""
    terms = [jnp.sum(outputs[path] * weight).real for path, weight in weights.items()]
    return jnp.sum(jnp.stack(terms))


def perturbed(data: Data, seed: int, precision: float = 0.0) -> Data:
    """The data with each parameter and input moved by a rounding, or not at all.

    What a program makes of it shows how far rounding carries there.

    Args:
      data: The data.
      seed: Where the directions come from.
      precision: The machine epsilon that the program works with, where it is coarser than that of
        the data.
    """
    random = np.random.default_rng([seed, 2])

    def move(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        size = max(float(jnp.finfo(x.dtype).eps), precision / 2)
        # In NumPy: a small program of JAX for each shape would have to be compiled.
        factor = 1 + size * random.integers(-1, 2, x.shape)
        return placed_like((np.asarray(x) * factor).astype(x.dtype), x)

    return data._replace(
        variables=jax.tree.map(move, data.variables), inputs=jax.tree.map(move, data.inputs)
    )


def failure(what: str, error: Exception) -> CaseError:
    """The error that says in one line what went wrong, and where in the user's code."""
    return CaseError(f"{what}: {first_line(error)}{_raised_in(error)}")


def _raised_in(error: Exception) -> str:
    """The last line of the traceback that is neither ours nor Flax's nor JAX's."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in _FRAMEWORKS and not name.startswith("importlib"):
            found = f" (line {line} of {name})"
    return found


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _arguments(case: Case) -> dict[str, Any]:
    return {"args": case.args, "kwargs": dict(case.kwargs)}


def _initialised(
    case: Case, side: LinenSide, arguments: Arguments, keys: dict[str, jax.Array]
) -> Mapping[str, Any]:
    def init(keys: dict[str, jax.Array]) -> Any:
        kwargs = {**side.extra, **arguments.kwargs}
        return side.module.init(keys, *arguments.args, method=case.method, **kwargs)

    try:
        return jax.jit(init)(keys)
    except Exception as error:
        raise failure(f"{case.name} does not initialise", error) from error


def _randomized(variables: Variables, seed: int) -> dict[str, Any]:
    """Parameters and statistics with noise, so that zero biases and unit scales hide nothing."""
    random = np.random.default_rng([seed, 3])

    def noisy(x: Any) -> Any:
        if not jnp.issubdtype(getattr(x, "dtype", np.int32), jnp.inexact):
            return x
        values = np.asarray(x)
        squares = np.abs(values.astype(np.complex128)) ** 2
        size = float(np.sqrt(squares.sum() / max(values.size, 1)))
        noise = random.standard_normal(x.shape) * _NOISE
        if size and (values.real > 0).all():
            # A variance, or a scale: it stays positive.
            moved = values * np.exp(noise)
        else:
            moved = values + noise * (size or 1.0)
        return placed_like(moved.astype(x.dtype), x)

    chosen = ("params", "batch_stats")
    return {c: jax.tree.map(noisy, v) if c in chosen else v for c, v in variables.items()}


def _direction(array: Any, random: np.random.Generator) -> Any:
    """Random values like the array; None for what has no direction, such as integers."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return None
    values = random.standard_normal(array.shape)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        values = values + 1j * random.standard_normal(array.shape)
    return placed_like(values.astype(array.dtype), array)
