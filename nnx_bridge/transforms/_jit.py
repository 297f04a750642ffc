"""`jit`: a compiled function of a module."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lifted import Functional
from lifted._errors import suggestion
from nnx_bridge.functional import NNXGroup
from nnx_bridge.transforms._targets import check_output, functionalized, lift_target, with_targets


def jit(
    target: Any,
    variables: Any = True,
    rngs: Any = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
    methods: Any = None,
) -> Any:
    """`flax.linen.jit` on NNX: compiles a module class, or a function of a module.

    What the function writes is written after each call. Modules with equal structure share one
    compiled program. Numbers drawn from RNG streams are those that a plain call draws.

    Args:
      target: a class of NNX modules, or a function of a module; may be written over a method.
      variables: filter of the collections that are visible inside.
      rngs: filter of the RNG streams that are visible inside.
      static_argnums: of arguments that are no arrays, hashable; 0 is the module.
      static_argnames: the same by name.
      donate_argnums: of arguments whose memory may be used; 0 is the module, which is kept.
      device: as for `jax.jit`, where that still takes it.
      backend: as for `jax.jit`, where that still takes it.
      methods: the methods of a class to lift, by default ``__call__``.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither.
      ValueError: a name in ``static_argnames`` is of no argument.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> norm = nn.jit(nnx.BatchNorm)(3, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.ones((2, 3)))
      >>> [round(float(x), 3) for x in norm.mean]
      [0.01, 0.01, 0.01]

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    placed = {"device": device, "backend": backend}
    options = {
        "variables": variables,
        "rngs": rngs,
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "donate_argnums": donate_argnums,
        **{name: value for name, value in placed.items() if value is not None},
    }
    return lift_target("jit", target, _jitted, options, methods)


class _Current(threading.local):
    """The calls in progress: what the program that is traced stands for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Functional, Callable[..., Any]]] = []


def _jitted(
    fn: Callable[..., Any],
    variables: Any = True,
    rngs: Any = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    **placed: Any,
) -> Callable[..., Any]:
    current = _Current()
    numbers, names = _static(fn, static_argnums, static_argnames)

    # The compiled program outlives the call, so it holds no module: what is static of the targets
    # is an argument, by which JAX finds the program, and the rest is taken from `current`.
    @functools.partial(
        jax.jit,
        static_argnums=(0, *(number + 1 for number in numbers)),
        static_argnames=names,
        donate_argnums=tuple(number + 1 for number in _many(donate_argnums) if number > 0),
        **placed,
    )
    def program(static: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        functional, inner = current.calls[-1]
        with functional.opened(variables) as (mdl, written):
            y = inner(mdl, *args, **kwargs)
            updates = written()
        check_output("jit", y)
        return y, updates

    @functools.wraps(fn)
    def jitted(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        inner, mdl, (args, kwargs) = with_targets(fn, mdl, (args, kwargs))
        functional = functionalized("jit", mdl, variables=variables, rngs=rngs)
        current.calls.append((functional, inner))
        try:
            y, updates = program(_static_of(functional), functional.variables, *args, **kwargs)
        finally:
            current.calls.pop()
        functional.publish(updates)
        return y

    return jitted


def _static_of(functional: Functional) -> Any:
    (group,) = functional.groups
    assert isinstance(group, NNXGroup)
    return functional.structure, group.definition


def _many(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, (int, str)) else tuple(given)


def _static(fn: Callable[..., Any], numbers: Any, names: Any) -> tuple[list[int], list[str]]:
    """Numbers and names of static arguments; each is both, so that it may be given either way."""
    names = list(_many(names))
    parameters = inspect.signature(fn).parameters
    known = list(parameters)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"jit: static_argnames: {getattr(fn, '__name__', fn)} has no argument "
                    f"{name!r}; {suggestion(name, known)}."
                )
    found = {number % len(known) if number < 0 else number for number in _many(numbers)}
    names += [known[number] for number in sorted(found) if number < len(known)]
    found |= {known.index(name) for name in names if name in known}
    keyword_only = {
        name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
    }
    positional = [number for number in sorted(found) if known[number] not in keyword_only]
    return positional, list(dict.fromkeys(names))
