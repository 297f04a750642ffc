"""A program of JAX in float64, whatever dtypes it was written in.

`jax.enable_x64` alone does not make a model exact: one that says `dtype=bfloat16` keeps to it. So
the program is traced as it is, and its equations are run again with every floating type replaced
by float64 (complex by complex128). What the dtypes are part of is done in the dtypes that were
written, and the result widened: a bit pattern, the next number. The random bits are therefore those
of the original program, and so are masks drawn from them.

Constants are the exception: what was rounded when the program was written cannot be had back.
`moved` shows how far that carries.

Beside each value goes the *precision* of the written program at that place: the largest machine
epsilon among all values that it depends on. A float32 array that was computed by way of bfloat16
has the precision of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nnx_bridge.equivalence._tags import inlined, mapped, programs

FLOAT32 = float(jnp.finfo("float32").eps)

# Where the dtype itself is the meaning.
_AS_WRITTEN = ("bitcast_convert_type", "nextafter")


# Programs that run a few times are compiled for longer than they run.
QUICKLY = {"xla_backend_optimization_level": 0}


class Exact:
    """A function in float64.

    Args:
      fn: A function of one pytree of arrays.
      data: Its argument, for the shapes.

    Attributes:
      precision: The machine epsilon behind each result, in a pytree like the result.
      rounded: The constants that are coarser than float32 and may have been rounded.
    """

    def __init__(self, fn: Callable[[Any], Any], data: Any) -> None:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(data)
        self._closed, self._structure = closed, jax.tree.structure(shapes)
        leaves = [_eps(leaf.dtype) for leaf in jax.tree.leaves(data)]
        self.precision = jax.tree.unflatten(self._structure, _precisions(closed, leaves))
        self.rounded = frozenset(_rounded(closed))
        self._run = jax.jit(lambda leaves: _run(closed, leaves), compiler_options=QUICKLY)

    def __call__(self, data: Any) -> Any:
        """The result, in NumPy arrays but for PRNG keys."""
        with jax.enable_x64(True):
            leaves = self._run([promote(leaf) for leaf in jax.tree.leaves(data)])
            return jax.tree.unflatten(self._structure, leaves)

    def moved(self, data: Any, constants: Set[Any], seed: int) -> Any:
        """The result with these constants, of those in `rounded`, moved by half a rounding."""
        random = np.random.default_rng(seed)

        def constant(x: Any) -> Any:
            wide = promote(x)
            if _constant(x) not in constants:
                return wide
            return wide * (1 + random.choice([-0.5, 0.5]) * _eps(x.dtype))

        with jax.enable_x64(True):
            run = jax.jit(
                lambda leaves: _run(self._closed, leaves, constant), compiler_options=QUICKLY
            )
            leaves = run([promote(leaf) for leaf in jax.tree.leaves(data)])
            return jax.tree.unflatten(self._structure, leaves)


def promote(x: Any) -> jax.Array:
    """An array in the widest dtype of its kind; inside of `jax.enable_x64` only."""
    array = x if isinstance(x, jax.Array) else jnp.asarray(x, getattr(x, "dtype", None))
    wide = _wide(array.dtype)
    return array if wide == array.dtype else array.astype(wide)


def _wide(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _run(
    closed: Any, arguments: Sequence[Any], constant: Callable[[Any], Any] = promote
) -> list[Any]:
    """The results of the equations with every floating type promoted, constants by `constant`."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            # First in the dtype that was written: 0.9 is another number in float32.
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in jaxpr.eqns:
        results = _evaluate(equation, [read(atom) for atom in equation.invars], constant)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(equation: Any, arguments: list[Any], constant: Callable[[Any], Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    program = inlined(equation)
    if program is not None:
        return _run(program, arguments, constant)
    if primitive.name == "shard_map":
        return mapped(params, arguments, lambda closed, parts: _run(closed, parts, constant))
    if primitive.name == "reduce_precision":
        return arguments
    if primitive.name in _AS_WRITTEN:
        arguments = [
            x.astype(v.aval.dtype) for x, v in zip(arguments, equation.invars, strict=True)
        ]
    else:
        params = {name: _promoted(value, constant) for name, value in params.items()}
        if primitive.name == "dot_general":
            # An algorithm is one of particular dtypes.
            params["precision"] = None
    results = primitive.bind(*arguments, **params)
    return [promote(x) for x in (results if primitive.multiple_results else [results])]


def _promoted(value: Any, constant: Callable[[Any], Any]) -> Any:
    """A parameter of an equation for promoted arguments."""
    if isinstance(value, core.ClosedJaxpr):
        # With their shardings, and the axes of a `jax.shard_map` that they vary over.
        shapes = jax.eval_shape(
            lambda *arguments: tuple(map(promote, arguments)), *(v.aval for v in value.jaxpr.invars)
        )
        return jax.make_jaxpr(lambda *arguments: _run(value, arguments, constant))(*shapes)
    if isinstance(value, core.Jaxpr):
        return _promoted(core.ClosedJaxpr(value, ()), constant).jaxpr
    if type(value) in (tuple, list):
        return type(value)(_promoted(item, constant) for item in value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _wide(np.dtype(value))
    return value


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _coarse(x: Any) -> bool:
    """Whether an array or a number is in a type that is coarser than float32, and not exact."""
    if _eps(x.dtype) <= FLOAT32:
        return False
    values = np.asarray(x).astype(np.float64)
    with np.errstate(all="ignore"):
        whole = (values == np.round(values)) | (1 / values == np.round(1 / values))
    return not whole.all()


def _constant(x: Any) -> tuple[str, bytes]:
    """What tells constants apart."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return str(x.dtype), np.asarray(jax.random.key_data(x) if key else x).tobytes()


def _rounded(closed: Any) -> Iterator[tuple[str, bytes]]:
    """The coarse constants in a program, at whatever depth."""
    literals = (a for e in closed.jaxpr.eqns for a in e.invars if isinstance(a, core.Literal))
    values = [np.asarray(a.val, getattr(a.aval, "dtype", None)) for a in literals]
    yield from (_constant(x) for x in [*closed.consts, *values] if _coarse(x))
    for equation in closed.jaxpr.eqns:
        for program in programs(equation.params):
            yield from _rounded(core.ClosedJaxpr(program, ()))


def _precisions(closed: Any, arguments: Sequence[float]) -> list[float]:
    """The precision of each result, from those of the arguments."""
    jaxpr = closed.jaxpr
    known: dict[Any, float] = {v: _eps(v.aval.dtype) for v in jaxpr.constvars}
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> float:
        return 0.0 if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        before = [read(atom) for atom in equation.invars]
        program = inlined(equation)
        if program is not None:
            results = _precisions(program, before)
        else:
            inside = max(map(_coarsest, programs(equation.params)), default=0.0)
            worst = max([*before, inside], default=0.0)
            results = [max(worst, _eps(v.aval.dtype)) for v in equation.outvars]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _coarsest(jaxpr: Any) -> float:
    """The largest machine epsilon in a program, at whatever depth."""
    inner = [program for e in jaxpr.eqns for program in programs(e.params)]
    own = [_eps(v.aval.dtype) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "dtype")]
    return max([*own, *map(_coarsest, inner)], default=0.0)
