"""Whether a Linen module is the same program under `lifted`, and hosted as NNX.

One call of the module is computed three ways, each compiled: by raw JAX over the pure function
`module.apply`, which is the reference; by `lifted` on the bound Linen module; and by `lifted` on
the module hosted as NNX. Each way runs three times: the call alone, reverse mode (the gradient of
a random combination of the outputs), and forward mode (the derivative in one random direction of
all parameters and inputs). After each the changed collections are compared too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, in_filter

import lifted
from nnx_bridge import _collections as collections
from nnx_bridge._case import Case, CaseError
from nnx_bridge._host import Host, default_mutable, unhost
from nnx_bridge._report import Report, Row, compare_arrays, raised

Arrays = dict[str, jax.Array]
Results = dict[str, Arrays]

# Programs that a check compares with the reference, and what it runs of each; in this order.
ROUTES = ("lifted on Linen", "lifted on NNX")
STAGES = ("call", "gradient", "jvp")
STEPS = 1 + (1 + len(ROUTES)) * len(STAGES)


def check(case: Case, *, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Compares a Linen module with itself under `lifted`, and hosted as NNX.

    Args:
        case: The module and one call of it.
        seed: Where parameters, keys, output weights and directions come from.
        progress: Called with what begins, `STEPS` times.

    Returns:
        A report with a row for each array of each of the two programs.

    Raises:
        CaseError: The module does not run, or nothing it returns can be differentiated.

    Example:
        >>> from flax import linen as nn
        >>> report = check(Case(nn.Dense(3), (np.ones((2, 4), np.float32),)))
        >>> report.agrees
        True
    """
    progress("initialise")
    problem = _Problem.make(case, seed)
    reference: dict[str, Results] = {}
    skipped: list[str] = []
    for stage in STAGES:
        progress(f"{stage}: raw JAX")
        try:
            reference[stage] = getattr(_Raw(problem), stage)()
        except Exception as error:
            if stage != "jvp":
                raise _failure(f"the {stage} of {case.name} in raw JAX", error) from error
            # A module with a custom_vjp, for one, has no forward mode.
            skipped.append(f"{stage}, which raw JAX refuses too: {_first_line(error)}")
    rows: list[Row] = []
    for route, program in zip(ROUTES, (_Linen(problem), _Hosted(problem)), strict=True):
        for stage in STAGES:
            progress(f"{stage}: {route}")
            if stage in reference:
                rows.extend(_rows(program, route, stage, reference[stage]))
    versions = {package: version(package) for package in ("flax", "jax")}
    order = list(dict.fromkeys(row.what for row in rows))
    rows.sort(key=lambda row: order.index(row.what))
    return Report(case.name, tuple(rows), seed, versions, tuple(skipped))


def _rows(program: _Program, route: str, stage: str, reference: Results) -> Iterator[Row]:
    try:
        results = getattr(program, stage)()
    except Exception as error:
        yield from (raised(what, route, error) for what, arrays in reference.items() if arrays)
        return
    for what, arrays in reference.items():
        yield from compare_arrays(what, route, results[what], arrays)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """All that the programs have in common; arrays are by path in what they belong to."""

    case: Case
    variables: Mapping[str, Any]
    mutable: CollectionFilter
    keys: dict[str, jax.Array]
    primals: Arrays  # The inputs that are differentiated.
    weights: Arrays  # Of the outputs, in the scalar whose gradient is taken.
    input_tangents: Arrays
    parameter_tangents: Any

    @classmethod
    def make(cls, case: Case, seed: int) -> _Problem:
        random = np.random.default_rng(seed)
        keys = case.keys(seed)
        variables = case.variables or _initialised(case, keys)
        primals = _inexact(_by_path(_inputs(case)))
        draft = cls(case, variables, default_mutable(variables), keys, primals, {}, {}, {})
        if case.mutable is not None:
            draft = dataclasses.replace(draft, mutable=case.mutable)
        try:
            outputs, _ = jax.eval_shape(_Raw(draft).apply, variables, primals)
        except Exception as error:
            raise _failure(f"{case.name} does not run", error) from error
        outputs = _inexact(outputs)
        if not outputs:
            raise CaseError(f"{case.name} returns no floating point array: nothing to compare")
        if not primals and not draft.has_parameters:
            raise CaseError(
                f"{case.name} has neither parameters nor inputs of floating point dtype: there is "
                "nothing to differentiate"
            )
        return dataclasses.replace(
            draft,
            weights=_directions(outputs, random),
            input_tangents=_directions(primals, random),
            parameter_tangents=jax.tree.map(
                lambda x: _direction(x, random), variables.get("params", {})
            ),
        )

    def arguments(self, primals: Arrays) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with these values of the inputs."""
        inputs = jax.tree_util.tree_map_with_path(
            lambda path, leaf: primals.get(_text(path), leaf), _inputs(self.case)
        )
        return inputs["args"], inputs["kwargs"]

    def loss(self, outputs: Arrays) -> jax.Array:
        """A generic combination of the outputs: no symmetry of theirs cancels in it."""
        terms = [jnp.sum(outputs[path] * weight).real for path, weight in self.weights.items()]
        return jnp.sum(jnp.stack(terms))

    @property
    def has_parameters(self) -> bool:
        return bool(jax.tree.leaves(self.variables.get("params")))


class _Program(Protocol):
    def call(self) -> Results: ...
    def gradient(self) -> Results: ...
    def jvp(self) -> Results: ...


class _Raw:
    """`module.apply` under `jax.grad` and `jax.jvp`."""

    def __init__(self, problem: _Problem) -> None:
        self._problem = problem

    def apply(self, variables: Mapping[str, Any], primals: Arrays) -> tuple[Arrays, Any]:
        p = self._problem
        args, kwargs = p.arguments(primals)
        options: dict[str, Any] = {"rngs": p.keys, "mutable": p.mutable, "method": p.case.method}
        result = p.case.module.apply(variables, *args, **options, **kwargs)
        output, updates = (result, {}) if p.mutable is False else result
        return _by_path(output), updates

    def call(self) -> Results:
        p = self._problem
        outputs, updates = jax.jit(self.apply)(p.variables, p.primals)
        return {"output": outputs, "state": _by_path(updates)}

    def gradient(self) -> Results:
        p = self._problem

        def loss(parameters: Any, primals: Arrays) -> tuple[jax.Array, Any]:
            outputs, updates = self.apply(_with_params(p.variables, parameters), primals)
            return p.loss(outputs), updates

        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
        (parameters, inputs), updates = grad(p.variables.get("params", {}), p.primals)
        return _gradients(inputs, {"params": parameters}, updates)

    def jvp(self) -> Results:
        p = self._problem

        def push(parameters: Any, primals: Arrays, tangents: Any) -> Any:
            def outputs(parameters: Any, primals: Arrays) -> tuple[Arrays, Any]:
                outputs, updates = self.apply(_with_params(p.variables, parameters), primals)
                return _inexact(outputs), updates

            inputs = (parameters, primals)
            return jax.jvp(outputs, inputs, jax.tree.map(_full, inputs, tangents), has_aux=True)

        tangents = (p.parameter_tangents, p.input_tangents)
        _, dots, updates = jax.jit(push)(p.variables.get("params", {}), p.primals, tangents)
        return _tangents(dots, updates)


class _Linen:
    """`lifted` on the bound Linen module."""

    def __init__(self, problem: _Problem) -> None:
        self._problem = problem

    def _run(self, step: Callable[[Any, Arrays], Any]) -> tuple[Any, Any]:
        """What a step computes on the bound module, and the collections that it changed."""
        p = self._problem

        def program(variables: Mapping[str, Any], primals: Arrays) -> tuple[Any, Any]:
            module = p.case.module.bind(variables, rngs=p.keys, mutable=p.mutable)
            result = step(module, primals)
            _, updates = module.unbind()
            return result, _changeable(updates, p.mutable)

        return jax.jit(program)(p.variables, p.primals)

    def _outputs(self, module: Any, primals: Arrays) -> Arrays:
        args, kwargs = self._problem.arguments(primals)
        method = self._problem.case.method or "__call__"
        if isinstance(method, str):
            return _by_path(getattr(module, method)(*args, **kwargs))
        return _by_path(method(module, *args, **kwargs))

    def call(self) -> Results:
        outputs, updates = self._run(self._outputs)
        return {"output": outputs, "state": _by_path(updates)}

    def gradient(self) -> Results:
        (parameters, inputs), updates = self._run(_lifted_gradient(self._problem, self._outputs))
        return _gradients(inputs, parameters, updates)

    def jvp(self) -> Results:
        dots, updates = self._run(_lifted_jvp(self._problem, self._outputs))
        return _tangents(dots, updates)


class _Hosted(_Linen):
    """`lifted` on the host, an NNX module, under `nnx.jit`."""

    def _run(self, step: Callable[[Any, Arrays], Any]) -> tuple[Any, Any]:
        p = self._problem
        model = Host(p.case.module, p.variables, mutable=p.mutable)
        result = nnx.jit(step)(model, p.primals)
        return result, _changeable(unhost(model)[1], p.mutable)

    def _outputs(self, module: Any, primals: Arrays) -> Arrays:
        args, kwargs = self._problem.arguments(primals)
        options: dict[str, Any] = {"rngs": self._problem.keys, "method": self._problem.case.method}
        return _by_path(module(*args, **options, **kwargs))


def _lifted_gradient(
    problem: _Problem, outputs: Callable[[Any, Arrays], Arrays]
) -> Callable[[Any, Arrays], tuple[Any, Arrays]]:
    def gradient(module: Any, primals: Arrays) -> tuple[Any, Arrays]:
        def loss(mdl: Any, primals: Arrays) -> jax.Array:
            return problem.loss(outputs(mdl, primals))

        if not problem.has_parameters:
            (inputs,) = lifted.grad(loss, module, primals)
            return {}, inputs
        parameters, inputs = lifted.grad(loss, module, primals, grad_variables="params")
        if isinstance(parameters, nnx.State):
            parameters = collections.to_variables(parameters)
        return parameters, inputs

    return gradient


def _lifted_jvp(
    problem: _Problem, outputs: Callable[[Any, Arrays], Arrays]
) -> Callable[[Any, Arrays], Arrays]:
    def push(module: Any, primals: Arrays) -> Arrays:
        _, dots = lifted.jvp(
            lambda mdl, primals: _inexact(outputs(mdl, primals)),
            module,
            (primals,),
            (problem.input_tangents,),
            {"params": problem.parameter_tangents} if problem.has_parameters else {},
        )
        return dots

    return push


def _initialised(case: Case, keys: dict[str, jax.Array]) -> Mapping[str, Any]:
    def init(keys: dict[str, jax.Array]) -> Any:
        return case.module.init(keys, *case.args, method=case.method, **case.kwargs)

    try:
        return jax.jit(init)(keys)
    except Exception as error:
        raise _failure(f"{case.name} does not initialise", error) from error


def _failure(what: str, error: Exception) -> CaseError:
    return CaseError(f"{what}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _inputs(case: Case) -> dict[str, Any]:
    return {"args": case.args, "kwargs": dict(case.kwargs)}


def _gradients(inputs: Arrays, parameters: Any, updates: Any) -> Results:
    return {
        "input gradient": _inexact(inputs),
        "parameter gradient": _inexact(_by_path(parameters)),
        "state after gradient": _by_path(updates),
    }


def _tangents(dots: Arrays, updates: Any) -> Results:
    return {"output tangent": dots, "state after jvp": _by_path(updates)}


def _with_params(variables: Mapping[str, Any], parameters: Any) -> dict[str, Any]:
    return {**variables, "params": parameters} if "params" in variables else dict(variables)


def _changeable(variables: Mapping[str, Any], mutable: CollectionFilter) -> dict[str, Any]:
    return {name: tree for name, tree in variables.items() if in_filter(mutable, name)}


def _by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree, out of their boxes, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return {_text(path): leaf for path, leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)}


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "result"


def _inexact(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {path: x for path, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _directions(arrays: Arrays, random: np.random.Generator) -> Arrays:
    return {path: _direction(array, random) for path, array in arrays.items()}


def _direction(array: Any, random: np.random.Generator) -> Any:
    """Random values like the array; None for what has no direction, such as integers."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return None
    values = random.standard_normal(array.shape)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        values = values + 1j * random.standard_normal(array.shape)
    return jnp.asarray(values, array.dtype)


def _full(primal: Any, tangent: Any) -> Any:
    """The tangent that raw JAX demands, also of what has no direction."""
    return np.zeros(np.shape(primal), jax.dtypes.float0) if tangent is None else tangent
