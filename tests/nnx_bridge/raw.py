"""Every transform on an NNX module twice: as ours, and by hand over `nnx.split` and `nnx.merge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import lifted
from tests.helpers import call, normal_like, total

Fn = Callable[..., Any]


def vector(mdl: Any, *args: Any) -> jax.Array:
    """A function of a module with two outputs."""
    return mdl(*args).reshape(-1)[:2]


def pure(graphdef: Any, fn: Fn) -> Fn:
    """``fn(mdl, x)`` as a function of parameters, other variables and input; the state that it
    leaves is its auxiliary output."""

    def of_state(params: nnx.State, rest: nnx.State, x: Any) -> tuple[Any, nnx.State]:
        mdl = nnx.merge(graphdef, params, rest, copy=True)
        y = fn(mdl, x)
        return y, nnx.state(mdl)

    return of_state


def by_hand(transform: Fn, fn: Fn, wrt: Any = nnx.Param) -> Fn:
    """``(mdl, x) -> (result, state)`` for a transform of ``(pure, params, rest, x)``."""

    def apply(mdl: Any, x: Any) -> tuple[Any, nnx.State]:
        graphdef, params, rest = nnx.split(mdl, wrt, ...)
        return transform(pure(graphdef, fn), params, rest, x)

    return apply


def ours(transform: Fn) -> Fn:
    """``(mdl, x) -> (result, state)`` for a transform of ``(mdl, x)``, which leaves ``mdl`` as it
    is."""

    def apply(mdl: Any, x: Any) -> tuple[Any, nnx.State]:
        mdl = nnx.merge(*nnx.split(mdl), copy=True)
        return transform(mdl, x), nnx.state(mdl)

    return apply


def of_state(transform: Fn, mdl: Any) -> Fn:
    """``(mdl, x) -> ...`` as a function of the state of ``mdl``, to look at its program."""
    graphdef, _ = nnx.split(mdl)
    return lambda state, x: transform(nnx.merge(graphdef, state, copy=True), x)


def _vjp(pure: Fn, params: Any, rest: Any, x: Any) -> Any:
    y, bwd, state = jax.vjp(lambda p, x: pure(p, rest, x), params, x, has_aux=True)
    return (y, bwd(y)), state


def _our_vjp(mdl: Any, x: Any) -> Any:
    y, bwd = lifted.vjp(call, mdl, x)
    return y, bwd(y)


def direction(mdl: Any, x: Any) -> tuple[nnx.State, Any]:
    """A tangent for each parameter and for the input."""
    return normal_like(nnx.state(mdl, nnx.Param)), normal_like(x)


def _jvp(pure: Fn, params: Any, rest: Any, x: Any) -> Any:
    tangents = direction(params, x)
    y, y_dot, state = jax.jvp(lambda p, x: pure(p, rest, x), (params, x), tangents, has_aux=True)
    return (y, y_dot), state


def _our_jvp(mdl: Any, x: Any) -> Any:
    t_params, t_x = direction(mdl, x)
    return lifted.jvp(call, mdl, (x,), (t_x,), t_params)


def _linearize(pure: Fn, params: Any, rest: Any, x: Any) -> Any:
    y, f_jvp, state = jax.linearize(lambda p, x: pure(p, rest, x), params, x, has_aux=True)
    return (y, f_jvp(*direction(params, x))), state


def _our_linearize(mdl: Any, x: Any) -> Any:
    y, f_jvp = lifted.linearize(call, mdl, x, grad_variables="params")
    return y, f_jvp(*direction(mdl, x))


def _hvp(pure: Fn, params: Any, rest: Any, x: Any) -> Any:
    def gradient(params: Any, x: Any) -> Any:
        return jax.grad(pure, argnums=(0, 2), has_aux=True)(params, rest, x)

    tangents = direction(params, x)
    _, product, state = jax.jvp(gradient, (params, x), tangents, has_aux=True)
    return product, state


def _our_hvp(mdl: Any, x: Any) -> Any:
    t_params, t_x = direction(mdl, x)
    return lifted.hvp(total, mdl, (x,), (t_x,), t_params, grad_variables="params")


def _value_and_grad(pure: Fn, params: Any, rest: Any, x: Any) -> Any:
    (y, state), grad = jax.value_and_grad(pure, argnums=2, has_aux=True)(params, rest, x)
    return (y, (grad,)), state


# Names, our transform, and the same by hand.
PAIRS: dict[str, tuple[Fn, Fn]] = {
    "grad": (
        lambda mdl, x: lifted.grad(total, mdl, x, grad_variables=nnx.Param),
        by_hand(lambda f, *args: jax.grad(f, argnums=(0, 2), has_aux=True)(*args), total),
    ),
    "value_and_grad": (
        lambda mdl, x: lifted.value_and_grad(total, mdl, x),
        by_hand(_value_and_grad, total),
    ),
    "vjp": (_our_vjp, by_hand(_vjp, call)),
    "jvp": (_our_jvp, by_hand(_jvp, call)),
    "linearize": (_our_linearize, by_hand(_linearize, call)),
    "jacfwd": (
        lambda mdl, x: lifted.jacfwd(vector, mdl, x)[0],
        by_hand(lambda f, *args: jax.jacfwd(f, argnums=2, has_aux=True)(*args), vector),
    ),
    "jacrev": (
        lambda mdl, x: lifted.jacrev(vector, mdl, x, grad_variables="params"),
        by_hand(lambda f, *args: jax.jacrev(f, argnums=(0, 2), has_aux=True)(*args), vector),
    ),
    "hessian": (
        lambda mdl, x: lifted.hessian(total, mdl, x)[0][0],
        by_hand(lambda f, *args: jax.hessian(f, argnums=2, has_aux=True)(*args), total),
    ),
    "hvp": (_our_hvp, by_hand(_hvp, total)),
}
