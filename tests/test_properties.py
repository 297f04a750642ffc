"""Whatever the module, the filter and the tangents: a transform of ours is the raw JAX transform of
the pure function, equation by equation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from hypothesis import assume, example, given
from hypothesis import strategies as st

import lifted
import nnx_bridge
from lifted._errors import key_of
from tests.helpers import assert_trees_equal, initialized, normal, normal_like, program
from tests.programs import COLLECTIONS, LINEN_NESTS, NNX_NESTS, Linen, Native, recipes


def loss(mdl: Any, x: jax.Array) -> jax.Array:
    y = mdl(x)
    return jnp.sum(jnp.abs(y) ** 2 + jnp.sin(y).real)


def vector(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x).reshape(-1)[:2]


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a call is asked for.

    Attributes:
      transform: its name.
      variables: number that says which variables it differentiates.
      primal: whether it differentiates the primal.
    """

    transform: str
    variables: int
    primal: bool

    def chosen(self, path: tuple[Any, ...], value: Any = None) -> bool:
        """A predicate that looks random, and is one of the path alone."""
        return bool(sum(map(ord, "/".join(map(str, path)))) * self.variables % 3)

    @property
    def of_primal(self) -> bool:
        return self.primal or not self.variables or self.transform in ("vjp", "linearize")

    @property
    def fn(self) -> Callable[..., Any]:
        return vector if self.transform in ("vjp", "jvp", "jacfwd", "jacrev", "linearize") else loss


REVERSE = ("grad", "value_and_grad", "vjp", "jacrev")
TRANSFORMS = (*REVERSE, "jvp", "linearize", "jacfwd", "hvp")
asks = st.builds(Ask, st.sampled_from(TRANSFORMS), st.integers(0, 2), st.booleans())


def ours(ask: Ask, mdl: Any, x: jax.Array, tangents: Any) -> Any:
    """The call of `lifted`."""
    t_variables, t_x = tangents
    wrt = ask.chosen if jax.tree.leaves(t_variables) else False
    select = {"grad_variables": wrt, "argnums": (0,) if ask.of_primal else ()}
    match ask.transform:
        case "vjp":
            y, bwd = lifted.vjp(ask.fn, mdl, x, vjp_variables=wrt)
            return y, bwd(jnp.ones_like(y))
        case "jvp":
            return lifted.jvp(ask.fn, mdl, (x,), (t_x,), t_variables)
        case "linearize":
            y, f_jvp = lifted.linearize(ask.fn, mdl, x, grad_variables=wrt)
            return y, f_jvp(*((t_variables,) if wrt else ()), t_x)
        case "hvp":
            return lifted.hvp(ask.fn, mdl, (x,), (t_x,), t_variables, **select)
    return getattr(lifted, ask.transform)(ask.fn, mdl, x, **select)


def raw(ask: Ask, pure: Callable[..., Any], values: list[Any], tangents: list[Any]) -> Any:
    """The call of JAX on ``pure(values) -> (y, rest)``, and ``rest``."""
    match ask.transform:
        case "vjp":
            y, bwd, rest = jax.vjp(pure, values, has_aux=True)
            return (y, bwd(jnp.ones_like(y))), rest
        case "jvp":
            y, dot, rest = jax.jvp(pure, (values,), (tangents,), has_aux=True)
            return (y, dot), rest
        case "linearize":
            y, f_jvp, rest = jax.linearize(pure, values, has_aux=True)
            return (y, f_jvp(tangents)), rest
        case "hvp":
            gradient = jax.grad(pure, has_aux=True)
            _, product, rest = jax.jvp(gradient, (values,), (tangents,), has_aux=True)
            return product, rest
        case "value_and_grad":
            (y, rest), grads = jax.value_and_grad(pure, has_aux=True)(values)
            return (y, grads), rest
    return getattr(jax, ask.transform)(pure, has_aux=True)(values)


def _active(variables: Any, ask: Ask) -> list[int]:
    """Places of the leaves of ``(variables, x)`` that are differentiated."""
    named = jax.tree_util.tree_leaves_with_path(variables)
    chosen = [
        i
        for i, (path, value) in enumerate(named)
        if ask.chosen(tuple(map(key_of, path))) and jnp.issubdtype(value.dtype, jnp.inexact)
    ]
    return [*chosen, len(named)] if ask.of_primal else chosen


def _tangents(variables: Any, x: Any, places: list[int]) -> tuple[Any, Any]:
    """Tangents of the leaves at ``places``; what is left out is None."""
    leaves, treedef = jax.tree.flatten((variables, x))
    return treedef.unflatten(
        [normal_like(x) if i in places else None for i, x in enumerate(leaves)]
    )


def _arrays(tree: Any) -> list[Any]:
    """Leaves of a result, without the trivial ones of integers and keys."""
    return [x for x in jax.tree.leaves(tree) if getattr(x, "dtype", None) != jax.dtypes.float0]


def _merge(leaves: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    merged = list(leaves)
    for place, value in zip(places, values, strict=True):
        merged[place] = value
    return merged


def _check(actual: Any, expected: Any, state: Any, x: jax.Array, run: bool) -> None:
    with jax.checking_leaks():
        assert program(actual, state, x) == program(expected, state, x)
        if run:
            assert_trees_equal(actual(state, x), expected(state, x))


# Linen.

DTYPES = {"float32": False, "bfloat16": False, "complex64": False, "float64": True}


@given(recipes(LINEN_NESTS), asks, st.sampled_from(list(DTYPES)), st.integers(0, 9))
@example(("norm", ("vmap", "norm", "sow")), Ask("jvp", 2, True), "float64", 0)
@example((("method", "dropout", "perturb"), "boxed"), Ask("linearize", 1, False), "bfloat16", 1)
@example(("scan", ("remat", "count", "norm")), Ask("hvp", 1, True), "float32", 1)
def test_random_linen_modules(recipe: Any, ask: Ask, dtype: str, number: int) -> None:
    if dtype == "complex64" and ask.transform in ("jacfwd", "jacrev", "hvp"):
        dtype = "float32"  # JAX asks for holomorphic functions there.
    with jax.enable_x64(True) if DTYPES[dtype] else contextlib.nullcontext():
        _check_linen(Linen(recipe, jnp.dtype(dtype)), ask, number == 0)


def _check_linen(module: nn.Module, ask: Ask, run: bool) -> None:
    x = normal(4, 3).astype(module.dtype)
    variables = initialized(module, x)
    variables.pop("intermediates", None)
    rngs = {"dropout": jax.random.key(1)}
    mutable = [c for c in COLLECTIONS if c not in ("params", "perturbations")]
    places = _active(variables, ask)
    assume(places)
    tangents = _tangents(variables, x, places)

    def actual(variables: Any, x: Any) -> Any:
        transform = lambda mdl, x: ours(ask, mdl, x, tangents)  # noqa: E731
        result, updates = nn.apply(transform, module, mutable=mutable)(variables, x, rngs=rngs)
        return _arrays(result), updates

    def expected(variables: Any, x: Any) -> Any:
        leaves, treedef = jax.tree.flatten((variables, x))

        def pure(values: list[Any]) -> Any:
            variables, x = treedef.unflatten(_merge(leaves, places, values))
            return nn.apply(ask.fn, module, mutable=mutable)(variables, x, rngs=rngs)

        values = [leaves[i] for i in places]
        result, updates = raw(ask, pure, values, jax.tree.leaves(tangents))
        return jax.tree.leaves(result), updates

    _check(actual, expected, variables, x, run)


# NNX.


@given(recipes(NNX_NESTS), asks, st.integers(0, 9))
@example(("norm", ("shared", "norm", "sow"), "again"), Ask("jvp", 2, True), 0)
@example((("list", "dropout", "perturb"), "boxed"), Ask("linearize", 1, False), 1)
@example(("scan", ("sequential", "count", "norm")), Ask("hvp", 1, True), 1)
def test_random_nnx_modules(recipe: Any, ask: Ask, number: int) -> None:
    mdl = Native(recipe, nnx.Rngs(0))
    x = normal(4, 3)
    graphdef, state = nnx.split(mdl)
    pure_state = nnx.to_pure_dict(state)
    places = _active(pure_state, ask)
    assume(places)
    t_pure, t_x = _tangents(pure_state, x, places)
    tangents = nnx.State(t_pure), t_x
    kinds = nnx.Intermediate, nnx.Perturbation

    def actual(state: nnx.State, x: Any) -> Any:
        mdl = nnx.merge(graphdef, state, copy=True)
        transform = lambda mdl, x: _arrays(ours(ask, mdl, x, tangents))  # noqa: E731
        result, *captured = nnx_bridge.capture(transform, *kinds)(mdl, x)
        return result, [*captured, nnx.state(mdl)]

    def expected(state: nnx.State, x: Any) -> Any:
        leaves, treedef = jax.tree.flatten((state, x))

        def pure(values: list[Any]) -> Any:
            state, x = treedef.unflatten(_merge(leaves, places, values))
            mdl = nnx.merge(graphdef, state, copy=True)
            y, *captured = nnx_bridge.capture(ask.fn, *kinds)(mdl, x)
            return y, [*captured, nnx.state(mdl)]

        values = [leaves[i] for i in places]
        result, rest = raw(ask, pure, values, jax.tree.leaves(tangents))
        return jax.tree.leaves(result), rest

    _check(actual, expected, state, x, number == 0)
