"""A program of JAX in float64, whatever dtypes it was written in.

`jax.enable_x64` alone does not make a model exact: one that says `dtype=bfloat16` keeps to it. So
the program is traced as it is, and its equations are run again with every floating type replaced
by float64 (complex by complex128). What the dtypes are part of is done in the dtypes that were
written, and the result widened: a bit pattern, the next number. The random bits are therefore those
of the original program, and so are masks drawn from them.

Beside each value goes the *precision* of the written program at that place: the largest machine
epsilon among all values that it depends on. A float32 array that was computed by way of bfloat16
has the precision of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nnx_bridge.equivalence._tags import inlined, programs

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
    """

    def __init__(self, fn: Callable[[Any], Any], data: Any) -> None:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(data)
        self._closed, self._structure = closed, jax.tree.structure(shapes)
        leaves = [_eps(leaf.dtype) for leaf in jax.tree.leaves(data)]
        self.precision = jax.tree.unflatten(self._structure, _precisions(closed, leaves))
        self._run = jax.jit(lambda leaves: _run(closed, leaves), compiler_options=QUICKLY)

    def __call__(self, data: Any) -> Any:
        """The result, in NumPy arrays but for PRNG keys."""
        with jax.enable_x64(True):
            leaves = self._run([promote(leaf) for leaf in jax.tree.leaves(data)])
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


def _run(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """The results of the equations with every floating type promoted."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(promote, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            # First in the dtype that was written: 0.9 is another number in float32.
            aval: Any = atom.aval
            return promote(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in jaxpr.eqns:
        results = _evaluate(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(equation: Any, arguments: list[Any]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    program = inlined(equation)
    if program is not None:
        return _run(program, arguments)
    if primitive.name == "reduce_precision":
        return arguments
    if primitive.name in _AS_WRITTEN:
        arguments = [
            x.astype(v.aval.dtype) for x, v in zip(arguments, equation.invars, strict=True)
        ]
    else:
        params = {name: _promoted(value) for name, value in params.items()}
        if primitive.name == "dot_general":
            # An algorithm is one of particular dtypes.
            params["precision"] = None
    results = primitive.bind(*arguments, **params)
    return [promote(x) for x in (results if primitive.multiple_results else [results])]


def _promoted(value: Any) -> Any:
    """A parameter of an equation for promoted arguments."""
    if isinstance(value, core.ClosedJaxpr):
        shapes = [
            jax.ShapeDtypeStruct(v.aval.shape, _wide(v.aval.dtype)) for v in value.jaxpr.invars
        ]
        return jax.make_jaxpr(lambda *arguments: _run(value, arguments))(*shapes)
    if isinstance(value, core.Jaxpr):
        return _promoted(core.ClosedJaxpr(value, ())).jaxpr
    if type(value) in (tuple, list):
        return type(value)(map(_promoted, value))
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _wide(np.dtype(value))
    return value


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


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
