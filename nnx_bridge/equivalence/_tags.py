"""Values with a name in a program of JAX, and the same program with them among its results.

What a module computes inside of a scanned, mapped or rematerialised function belongs to another
trace: it cannot be kept from there. It can be *named* there. A tag is a primitive that does nothing
to its operand, and stays in the program through whatever JAX makes of it: a derivative, a batch, a
checkpoint. Its transpose is a tag too, which names the gradient at that place. When the program is
whole, `hoisted` runs its equations and takes the tagged values out. Out of a scan they come
stacked; out of the branches of a `cond` with the word whether the branch was taken. A `while` may
go on for any number of steps: they come out of the first, which is a branch like others, since
there may be none. What is tagged in a `shard_map` stays inside.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# Programs that are called only for what is in them.
_INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")

# What runs the equations of a branch, and adds to what is tagged.
_Branch: TypeAlias = Callable[[Sequence[Any], list["Tagged"], Iterator[int]], Sequence[Any]]


class Tagged(NamedTuple):
    """A value that was taken out of a program.

    Attributes:
      tag: What it was tagged with.
      value: The value: of all steps of the loops around it, stacked along the first axes.
      stack: How many steps these loops have, the outermost first.
      place: Where it was in the program: the number of the tag or loop at each level of loops.
      backward: Whether it is the gradient at the tagged value.
      ran: For each step, whether the program went there: a value in a branch that was not taken is
        none. None outside of branches.
    """

    tag: Any
    value: Any
    stack: tuple[int, ...]
    place: tuple[int, ...]
    backward: bool
    ran: Any = None


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
    if primitive.name == "shard_map":
        return mapped(params, arguments, lambda closed, x: core.jaxpr_as_fun(closed)(*x))
    if any(map(_has_tags, programs(params))):
        if primitive.name == "scan":
            return _scan(equation, arguments, found, next(places))
        # One of which XLA takes a branch for each platform has no index here.
        if primitive.name == "cond" and params.get("branches_platforms") is None:
            branches = [functools.partial(_run, closed) for closed in params["branches"]]
            return _switch(arguments[0], branches, arguments[1:], found, places)
        if primitive.name == "while":
            return _while(equation, arguments, found, places)
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
        return results[:n_carry], (results[n_carry:], [(x.value, x.ran) for x in inside])

    carry, (ys, values) = jax.lax.scan(
        step,
        carry,
        arguments[n_consts + n_carry :],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    for each, (value, ran) in zip(inside, values, strict=True):
        stack, places = (params["length"], *each.stack), (place, *each.place)
        found.append(each._replace(value=value, ran=ran, stack=stack, place=places))
    return [*carry, *ys]


def _switch(
    index: Any,
    branches: Sequence[_Branch],
    operands: Sequence[Any],
    found: list[Tagged],
    places: Iterator[int],
) -> Sequence[Any]:
    """The results of one of the branches, which gives the tagged values of the others as well."""
    inside: list[list[Tagged]] = [[] for _ in branches]

    def run(i: int, operands: Sequence[Any]) -> Any:
        # JAX may trace it more than once.
        inside[i].clear()
        results = branches[i](operands, inside[i], places)
        return list(results), [(x.value, _ran(x)) for x in inside[i]]

    shapes = [jax.eval_shape(lambda *x, i=i: run(i, x)[1], *operands) for i in range(len(branches))]

    def branch(i: int, *operands: Any) -> Any:
        results, own = run(i, operands)
        values: list[Any] = jax.tree.map(lambda x: jax.lax.full(x.shape, 0, x.dtype), shapes)
        return results, [*values[:i], own, *values[i + 1 :]]

    made = [functools.partial(branch, i) for i in range(len(branches))]
    results, values = jax.lax.switch(index, made, *operands)
    for each, (value, ran) in zip(itertools.chain(*inside), itertools.chain(*values), strict=True):
        found.append(each._replace(value=value, ran=ran))
    return list(results)


def _ran(each: Tagged) -> Any:
    return jnp.ones(each.stack, bool) if each.ran is None else each.ran


def _while(
    equation: Any, arguments: list[Any], found: list[Tagged], places: Iterator[int]
) -> Sequence[Any]:
    """The results of a loop whose first step is taken by itself, if there is one."""
    params = equation.params
    consts, n = arguments[: params["cond_nconsts"]], params["cond_nconsts"] + params["body_nconsts"]
    body_consts, carry = arguments[len(consts) : n], arguments[n:]
    (goes_on,) = _run(params["cond_jaxpr"], [*consts, *carry], found, places)

    def stay(carry: Sequence[Any], *_: Any) -> Sequence[Any]:
        return carry

    def step(carry: Sequence[Any], found: list[Tagged], places: Iterator[int]) -> Sequence[Any]:
        return _run(params["body_jaxpr"], [*body_consts, *carry], found, places)

    carry = list(_switch(goes_on.astype("int32"), [stay, step], carry, found, places))
    results: list[Any] = equation.primitive.bind(*consts, *body_consts, *carry, **params)
    return results


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
