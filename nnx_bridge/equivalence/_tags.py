"""Values with a name in a program of JAX, and the same program with them among its results.

What a module computes inside of a scanned, mapped or rematerialised function belongs to another
trace: it cannot be kept from there. It can be *named* there. A tag is a primitive that does nothing
to its operand, and stays in the program through whatever JAX makes of it: a derivative, a batch, a
checkpoint. Its transpose is a tag too, which names the gradient at that place. When the program is
whole, `hoisted` runs its equations and takes the tagged values out; out of a scan they come
stacked. What is tagged in a `while`, a `cond` or a `shard_map` stays inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# Programs that are called only for what is in them.
_INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")


class Tagged(NamedTuple):
    """A value that was taken out of a program.

    Attributes:
      tag: What it was tagged with.
      value: The value: of all steps of the loops around it, stacked along the first axes.
      stack: How many steps these loops have, the outermost first.
      place: Where it was in the program: the number of the tag or loop at each level of loops.
      backward: Whether it is the gradient at the tagged value.
    """

    tag: Any
    value: Any
    stack: tuple[int, ...]
    place: tuple[int, ...]
    backward: bool


def tagged(x: jax.Array, tag: Hashable) -> Any:
    """The array, with a tag on it and on the gradient there."""
    return _tag_p.bind(x, tag=tag, backward=False)


def hoisted(fn: Callable[[Any], Any], data: Any) -> tuple[Any, list[Tagged]]:
    """The result of a function, and what is tagged in it, in the order of the program.

    Example:
        >>> def double(x, _):
        ...     return 2 * tagged(x, "before"), None
        >>> result, (before,) = hoisted(lambda x: jax.lax.scan(double, x, None, length=3)[0], 1.0)
        >>> float(result), before.tag, before.value.tolist()
        (8.0, 'before', [1.0, 2.0, 4.0])
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(data)
    found: list[Tagged] = []
    results = _run(closed, jax.tree.leaves(data), found, itertools.count())
    return jax.tree.unflatten(jax.tree.structure(shapes), results), found


def inlined(equation: Any) -> Any:
    """The program that the equation does nothing but call; None for other equations."""
    name, params = equation.primitive.name, equation.params
    if name in _CHECKPOINTS:
        return core.ClosedJaxpr(params["jaxpr"], ())
    if name in _INLINED:
        return next(p for p in params.values() if isinstance(p, core.ClosedJaxpr))
    return None


def mapped(params: dict[str, Any], arguments: Sequence[Any], run: Callable[..., Any]) -> list[Any]:
    """A `jax.shard_map` whose program `run` runs: only in there have the axes of its mesh names.

    Args:
      params: Those of its equation.
      arguments: Its operands.
      run: Runs a program on a part of the operands.
    """
    closed = core.ClosedJaxpr(params["jaxpr"], ())
    same = {name: params[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
    axes = params["newly_manual_axes"]
    function = jax.shard_map(lambda *parts: tuple(run(closed, parts)), axis_names=axes, **same)
    return list(function(*arguments))


def programs(value: Any) -> list[Any]:
    """The programs among the parameters of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if type(value) in (tuple, list):
        return [program for item in value for program in programs(item)]
    return []


def _run(
    closed: Any, arguments: Sequence[Any], found: list[Tagged], places: Iterator[int]
) -> list[Any]:
    """The results of the equations; what is tagged is added to `found`."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = _evaluate(equation, [read(atom) for atom in equation.invars], found, places)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(
    equation: Any, arguments: list[Any], found: list[Tagged], places: Iterator[int]
) -> Sequence[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive is _tag_p:
        (value,) = arguments
        found.append(Tagged(params["tag"], value, (), (next(places),), params["backward"]))
        return arguments
    program = inlined(equation)
    if program is not None:
        return _run(program, arguments, found, places)
    if primitive.name == "scan" and any(map(_has_tags, programs(params))):
        return _scan(equation, arguments, found, next(places))
    if primitive.name == "shard_map":
        return mapped(params, arguments, lambda program, parts: _run(program, parts, [], places))
    results = primitive.bind(*arguments, **params)
    return results if primitive.multiple_results else [results]


def _scan(equation: Any, arguments: list[Any], found: list[Tagged], place: int) -> Sequence[Any]:
    """The results of a scan that gives the tagged values of each step as well."""
    params, body = equation.params, equation.params["jaxpr"]
    if not isinstance(body, core.ClosedJaxpr):
        body = core.ClosedJaxpr(body, getattr(body, "consts", ()))
    # How its parameters say this depends on the version of JAX.
    n_carry = sum(map(_is_alike, equation.outvars, body.jaxpr.outvars))
    n_consts = sum(map(_is_alike, equation.invars, body.jaxpr.invars)) - n_carry
    consts, carry = arguments[:n_consts], arguments[n_consts : n_consts + n_carry]
    inside: list[Tagged] = []

    def step(carry: Any, x: Any) -> Any:
        # JAX may trace it more than once.
        inside.clear()
        results = _run(body, [*consts, *carry, *x], inside, itertools.count())
        return results[:n_carry], (results[n_carry:], [each.value for each in inside])

    carry, (ys, values) = jax.lax.scan(
        step,
        carry,
        arguments[n_consts + n_carry :],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    for each, value in zip(inside, values, strict=True):
        stack, places = (params["length"], *each.stack), (place, *each.place)
        found.append(each._replace(value=value, stack=stack, place=places))
    return [*carry, *ys]


def _is_alike(outside: Any, inside: Any) -> bool:
    """Whether a value is the same in every step: what is scanned has one axis more outside."""
    return len(outside.aval.shape) == len(inside.aval.shape)


def _has_tags(jaxpr: Any) -> bool:
    return any(
        equation.primitive is _tag_p or any(map(_has_tags, programs(equation.params)))
        for equation in jaxpr.eqns
    )


def _transpose(ct: Any, x: Any, *, tag: Hashable, backward: bool) -> list[Any]:
    return [_tag_p.bind(ct, tag=tag, backward=not backward)]


def _batch(operands: Any, axes: Any, **params: Any) -> tuple[Any, int]:
    # To the front, so that models that map over different axes give the same.
    (x,), (axis,) = operands, axes
    return _tag_p.bind(jnp.moveaxis(x, axis, 0), **params), 0


_tag_p = core.Primitive("tag")
_tag_p.def_impl(lambda x, **_: x)
_tag_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_tag_p, _transpose)
batching.primitive_batchers[_tag_p] = _batch
mlir.register_lowering(_tag_p, lambda ctx, x, **_: [x])
