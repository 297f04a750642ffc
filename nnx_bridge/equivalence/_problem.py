"""The problem that a check poses to every program: one call, its data, and random directions.

All arrays of a problem are arguments of the compiled programs, never constants in them: XLA would
fold constants, and in each program differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import CollectionFilter, in_filter

from nnx_bridge.equivalence._case import Case, CaseError
from nnx_bridge.host._host import default_mutable

Arrays = dict[str, Any]  # Arrays by their paths.


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
    """A case with what it leaves open filled in."""

    case: Case
    mutable: CollectionFilter
    data: Data

    @classmethod
    def make(cls, case: Case, seed: int) -> Problem:
        """Draws what the case leaves to the seed.

        Raises:
          CaseError: The module does not run, or there is nothing to differentiate.
        """
        keys, inputs = case.keys(seed), by_path(_arguments(case))
        variables = case.variables or _initialised(case, keys)
        mutable = default_mutable(variables) if case.mutable is None else case.mutable
        problem = cls(case, mutable, Data(variables, inputs, keys, {}, {}, {}))
        try:
            outputs, _ = jax.eval_shape(problem.apply, problem.data, variables, inputs)
        except Exception as error:
            raise failure(f"{case.name} does not run", error) from error
        return dataclasses.replace(problem, data=problem._with_directions(inexact(outputs), seed))

    def run(self, run: Callable[..., Any], data: Data, primals: Arrays) -> Arrays:
        """The output of a function of the arguments of the call, with these primals in them."""
        arrays = {**data.inputs, **primals}
        arguments = jax.tree_util.tree_map_with_path(
            lambda path, leaf: arrays.get(_text(path), leaf), _arguments(self.case)
        )
        return by_path(run(*arguments["args"], **arguments["kwargs"]))

    def apply(
        self, data: Data, variables: Mapping[str, Any], primals: Arrays
    ) -> tuple[Arrays, Arrays]:
        """The pure function: outputs and changed collections of `module.apply`."""
        updates: Mapping[str, Any] = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal updates
            options: dict[str, Any] = {"mutable": self.mutable, "method": self.case.method}
            result = self.case.module.apply(variables, *args, rngs=data.keys, **options, **kwargs)
            output, updates = (result, {}) if self.mutable is False else result
            return output

        return self.run(run, data, primals), by_path(updates)

    def changeable(self, variables: Mapping[str, Any]) -> Arrays:
        """The arrays of the collections that the call may change."""
        return by_path({name: x for name, x in variables.items() if in_filter(self.mutable, name)})

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything in the collection `params`."""
        return bool(jax.tree.leaves(self.data.parameters))

    def _with_directions(self, outputs: Arrays, seed: int) -> Data:
        name, data = self.case.name, self.data
        if not outputs:
            raise CaseError(f"{name} returns no floating point array: nothing to compare")
        if not data.primals and not self.has_parameters:
            raise CaseError(
                f"{name} has neither parameters nor inputs of floating point dtype: there is "
                "nothing to differentiate"
            )
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


def by_path(tree: Any) -> Arrays:
    """The arrays of a pytree, out of their boxes, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return {_text(path): leaf for path, leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)}


def inexact(arrays: Arrays) -> Arrays:
    """The arrays that can be differentiated."""
    return {path: x for path, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def failure(what: str, error: Exception) -> CaseError:
    """The error that says in one line what went wrong."""
    return CaseError(f"{what}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _arguments(case: Case) -> dict[str, Any]:
    return {"args": case.args, "kwargs": dict(case.kwargs)}


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "result"


def _initialised(case: Case, keys: dict[str, jax.Array]) -> Mapping[str, Any]:
    def init(keys: dict[str, jax.Array]) -> Any:
        return case.module.init(keys, *case.args, method=case.method, **case.kwargs)

    try:
        return jax.jit(init)(keys)
    except Exception as error:
        raise failure(f"{case.name} does not initialise", error) from error


def _direction(array: Any, random: np.random.Generator) -> Any:
    """Random values like the array; None for what has no direction, such as integers."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return None
    values = random.standard_normal(array.shape)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        values = values + 1j * random.standard_normal(array.shape)
    return jnp.asarray(values, array.dtype)
