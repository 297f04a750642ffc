"""What a transform differentiates: some leaves of the variables and primals; the others are held.

A held leaf is closed over, so that the lifted program has no trace of it: no tensor of zeros, no
unused cotangent. Integers, booleans and keys are always held. Where a result needs an entry for
one, it is a ``float0`` zero, as in JAX.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifted._errors import Path, key_of
from lifted._functional import Functional
from lifted._group import Filter, Variables


def is_differentiable(x: Any) -> bool:
    """Whether ``x`` is a real or complex array or scalar."""
    if isinstance(x, (bool, int)):
        return False
    if isinstance(x, (float, complex)):
        return True
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def zeros_float0(shape: Sequence[int]) -> np.ndarray:
    """The tangent or cotangent of what cannot be differentiated."""
    return np.zeros(tuple(shape), jax.dtypes.float0)


def zeros_like_aval(x: Any) -> Any:
    """The zero tangent or cotangent of a value, of which only the type is looked at: that of JAX,
    which may say how the value is sharded and over which axes of a `jax.shard_map` it varies."""
    if not is_differentiable(x):
        return zeros_float0(x.shape)
    # JAX makes zeros of a type only as `jax.eval_shape` describes it.
    return jnp.zeros_like(jax.eval_shape(lambda x: x, x), x.dtype)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Variables and primals of one call, and which of their leaves are differentiated.

    Attributes:
      leaves: leaves of ``(variables, primals)``.
      treedef: their structure.
      active: indices of the leaves that are differentiated, ascending.
    """

    leaves: list[Any]
    treedef: Any
    active: tuple[int, ...]

    @classmethod
    def of(cls, variables: Variables, primals: tuple[Any, ...], wanted: Sequence[bool]) -> "Inputs":
        """Inputs of which those leaves are differentiated that are ``wanted`` and can be."""
        leaves, treedef = jax.tree.flatten((variables, primals))
        active = (
            i
            for i, (x, w) in enumerate(zip(leaves, wanted, strict=True))
            if w and is_differentiable(x)
        )
        return cls(leaves, treedef, tuple(active))

    @property
    def values(self) -> list[Any]:
        """The leaves that are differentiated."""
        return [self.leaves[i] for i in self.active]

    def active_paths(self) -> list[tuple[Path, Any]]:
        """Path, for messages, and value of each leaf that is differentiated."""
        variables, primals = self.treedef.unflatten(self.leaves)
        named = jax.tree_util.tree_leaves_with_path({"primals": primals, "variables": variables})
        entries = [(_name(path), leaf) for path, leaf in named]
        entries.sort(key=lambda entry: entry[0][0] == "primals")  # The order of `leaves`.
        return [entries[i] for i in self.active]

    def merge(self, values: Sequence[Any]) -> tuple[Variables, tuple[Any, ...]]:
        """``(variables, primals)`` with ``values`` in place of the differentiated leaves."""
        leaves = list(self.leaves)
        for i, value in zip(self.active, values, strict=True):
            leaves[i] = value
        return self.treedef.unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the caller asked derivatives for.

    Attributes:
      variables: filter of the variables; None where the result has no part for them.
      argnums: indices of the primals; None for all of them, an int for one that is returned bare,
        as in JAX.
      per_scope: whether the part of the variables is a list with one tree for each scope.
    """

    variables: Filter | None
    argnums: int | tuple[int, ...]
    per_scope: bool = False

    @classmethod
    def make(
        cls,
        name: str,
        variables: Filter,
        argnums: int | Sequence[int] | None,
        primals: Sequence[Any],
    ) -> "Selection":
        """The selection of a transform for which ``variables=False`` means: primals only.

        Raises:
          TypeError: ``argnums`` is neither an int nor a sequence of them.
          ValueError: an index is out of range, or nothing is selected.
        """
        asked = range(len(primals)) if argnums is None else argnums
        indices = tuple(asked) if isinstance(asked, Sequence) else (asked,)
        for i in indices:
            if not isinstance(i, int) or isinstance(i, bool):
                raise TypeError(
                    f"{name}: argnums: expected an int or a sequence of them, got {argnums!r}."
                )
            if not -len(primals) <= i < len(primals):
                raise ValueError(
                    f"{name}: argnums={argnums!r}: there are {len(primals)} primals, counted from "
                    "0."
                )
        if variables is False and not indices:
            raise ValueError(
                f"{name}: nothing to differentiate: there are no primals, and grad_variables "
                "selects no variables. Pass primals, or grad_variables='params'."
            )
        indices = tuple(i % len(primals) for i in indices)
        return cls(
            None if variables is False else variables,
            indices[0] if isinstance(argnums, int) else indices,
        )

    @property
    def filter(self) -> Filter:
        """The filter of the variables, False where none are asked for."""
        return False if self.variables is None else self.variables

    def inputs(
        self, functional: Functional, variables: Variables, primals: tuple[Any, ...]
    ) -> Inputs:
        """The inputs with the asked leaves active."""
        chosen = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        wanted = jax.tree.leaves(functional.match(variables, self.filter))
        for i, primal in enumerate(primals):
            wanted += [i in chosen] * len(jax.tree.leaves(primal))
        return Inputs.of(variables, primals, wanted)

    def layout(self, functional: Functional, inputs: Inputs) -> "Layout":
        """The form of the result: ``(variables, *primals)``, or ``primals``."""
        variables, primals = inputs.treedef.unflatten(range(len(inputs.leaves)))
        form: Any
        if isinstance(self.argnums, int):
            form = primals[self.argnums]
        else:
            form = tuple(primals[i] for i in self.argnums)
        if self.variables is not None:
            values, _ = inputs.treedef.unflatten(inputs.leaves)
            part = functional.prune(variables, functional.match(values, self.variables))
            part = functional.per_scope(part) if self.per_scope else part
            form = (part, form) if isinstance(self.argnums, int) else (part, *form)
        order, treedef = jax.tree.flatten(form)
        position = {index: k for k, index in enumerate(inputs.active)}
        avals = tuple(_aval(inputs.leaves[index]) for index in order)
        return Layout(treedef, tuple(position.get(index) for index in order), avals)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of a result that has one entry for each selected leaf.

    Attributes:
      treedef: structure of the result.
      sources: for each leaf of the result its position among the differentiated leaves, None for a
        held one.
      avals: for each leaf of the result the type of its value.
    """

    treedef: Any
    sources: tuple[int | None, ...]
    avals: tuple[Any, ...]

    def fill(
        self,
        derivative: Callable[[int], Any],
        zero: Callable[[tuple[int, ...]], Any] = zeros_float0,
    ) -> Any:
        """The result.

        Args:
          derivative: entry for a differentiated leaf, given its position among these.
          zero: entry for a held leaf, given its shape.
        """
        pairs = zip(self.sources, self.avals, strict=True)
        return self.treedef.unflatten(
            [zero(aval.shape) if k is None else derivative(k) for k, aval in pairs]
        )

    @property
    def active_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the differentiated leaves, in order of their position."""
        shapes = {
            k: aval.shape for k, aval in zip(self.sources, self.avals, strict=True) if k is not None
        }
        return [shapes[k] for k in sorted(shapes)]


def _name(path: tuple[Any, ...]) -> Path:
    """A path in names; the attribute in which a box or a Variable holds its value is none of
    them."""
    last = path[-1]
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        path = path[:-1]
    return tuple(map(key_of, path))


def _aval(x: Any) -> Any:
    try:
        return jax.typeof(x)
    except TypeError:  # Not an array: such a leaf is held, and its entry is trivial.
        return jax.ShapeDtypeStruct((), jax.dtypes.float0)
