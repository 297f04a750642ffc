"""What one call of a Linen module runs, found by tracing it without computing anything."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import errors
from flax import linen as nn

from nnx_bridge._collections import flatten
from nnx_bridge.audit._definitions import Source
from nnx_bridge.audit._findings import Audit, Finding, Kind, ModuleClass, of_linen
from nnx_bridge.audit._source import EVERYWHERE, audit_sources, variable_use
from nnx_bridge.compat import difference
from nnx_bridge.equivalence import Case, CaseError
from nnx_bridge.equivalence._inputs import drawn
from nnx_bridge.host import check_linen_module
from nnx_bridge.host._marks import traced_anew

Modules: TypeAlias = dict[tuple[str, ...], nn.Module]

# Layers of Linen that run modules of the user; the modules inside of the others are their own.
_AROUND_OTHERS = (nn.Sequential, nn.RNN, nn.Bidirectional, nn.WeightNorm, nn.SpectralNorm)

_RECORDED: Mapping[str, tuple[Kind, str]] = {
    "intermediates": ("sow", "nnx.Module.sow"),
    "perturbations": ("perturb", "nnx.Module.perturb"),
}


def audit_case(case: Case) -> Audit:
    """The audit of a Linen module and one call of it.

    Raises:
      Exception: What the module raises, when it is initialised or called.
    """
    program = _Program(case)
    streams = {"params", "dropout", *case.keys(0)}
    modules, variables = program.run(streams)
    sources, problems = _sources({type(m) for m in modules.values() if not _is_linen(m)})
    names = {type(m).__name__ for m in modules.values()}
    written, classes = audit_sources(sources, only=names)
    streams |= {finding.name for finding in written if finding.kind == "rng stream"}
    streams |= {m.rng_collection for m in modules.values() if isinstance(m, nn.Dropout)}
    draws = program.drawn(variables, streams)
    findings = [
        *_layers(modules),
        *_variables(modules, variables),
        *(
            Finding(
                "rng stream", name, "", "", "native", f"rngs.{name}()", "the call draws from it"
            )
            for name in draws
        ),
        # How layers, sows, collections and streams are reached was seen; the rest is in the source.
        *(f for f in written if f.kind in ("transform", "api", "parameter")),
    ]
    described = {cls.name.rpartition(".")[-1] for cls in classes}
    unseen = {type(m).__name__ for m in modules.values() if not _is_linen(m)} - described
    classes = (*classes, *(ModuleClass(name, "") for name in sorted(unseen)))
    return Audit(case.name, tuple(findings), classes, tuple(problems), len(sources))


class _Program:
    """Initialisation and one call of a module, to be traced."""

    def __init__(self, case: Case) -> None:
        self._case = case
        try:
            self._module = check_linen_module(case.module)
        except TypeError as error:
            raise CaseError(f"{case.name}: {error}; there is nothing to move") from error
        arguments = drawn((case.args, dict(case.kwargs)), seed=0)
        self._leaves, self._treedef = jax.tree.flatten(arguments)
        self._inputs = {i: x for i, x in enumerate(self._leaves) if _is_array(x)}

    def run(self, streams: Iterable[str]) -> tuple[Modules, Mapping[str, Any]]:
        """Every module that the two run, by path, and the shapes of all variables afterwards."""
        modules: Modules = {}

        def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            modules.setdefault(tuple(map(str, context.module.path)), context.module)
            return call(*args, **kwargs)

        def both(rngs: dict[str, jax.Array], inputs: dict[int, Any]) -> Any:
            args, kwargs = self._arguments(inputs)
            case, variables = self._case, self._case.variables
            if variables is None:
                variables = self._module.init(rngs, *args, method=case.method, **kwargs)
            return {**variables, **self._apply(variables, rngs, inputs)}

        with nn.intercept_methods(record), traced_anew():
            return modules, jax.eval_shape(both, _keys(streams), self._inputs)

    def drawn(self, variables: Mapping[str, Any], streams: Iterable[str]) -> list[str]:
        """The streams without which the call fails; `params` if there are parameters to make."""
        found = ["params"] if variables.get("params") else []
        for missing in sorted({*streams} - {"params"}):
            # Without `params` too, which stands in for every stream that is not given.
            rngs = _keys({*streams} - {missing, "params"})
            try:
                jax.eval_shape(self._apply, variables, rngs, self._inputs)
            except errors.InvalidRngError:
                found.append(missing)
        return found

    def _apply(self, variables: Any, rngs: dict[str, jax.Array], inputs: dict[int, Any]) -> Any:
        args, kwargs = self._arguments(inputs)
        call: Any = self._module.apply
        method = self._case.method
        _, updated = call(variables, *args, rngs=rngs, method=method, mutable=True, **kwargs)
        return updated

    def _arguments(self, inputs: dict[int, Any]) -> Any:
        leaves = [inputs.get(i, x) for i, x in enumerate(self._leaves)]
        return jax.tree.unflatten(self._treedef, leaves)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _keys(streams: Iterable[str]) -> dict[str, jax.Array]:
    return {name: jax.random.key(0) for name in sorted(streams)}


def _is_linen(module: nn.Module) -> bool:
    return type(module).__module__.startswith("flax.")


def _owner(modules: Modules, path: tuple[str, ...]) -> tuple[nn.Module | None, str]:
    """The module directly around a path, and the class of the nearest one of the user."""
    around = [modules[path[:i]] for i in reversed(range(len(path))) if path[:i] in modules]
    mine = next((type(m).__name__ for m in around if not _is_linen(m)), "")
    return (around[0] if around else None), mine


def _layers(modules: Modules) -> Iterable[Finding]:
    for path, module in modules.items():
        parent, owner = _owner(modules, path)
        if parent is not None and _is_linen(parent) and not isinstance(parent, _AROUND_OTHERS):
            continue
        try:
            row = difference(type(module))
        except KeyError:
            continue
        if row.linen not in EVERYWHERE:
            yield of_linen(
                row.linen,
                module=owner or type(module).__name__,
                where="/".join(path) or "(the model)",
                fields=_fields(module),
                settings=_settings(module),
            )


def _fields(module: nn.Module) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in fields}


def _settings(module: nn.Module) -> dict[str, str]:
    """The fields that are not at their defaults, as text."""
    shown = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in ("parent", "name") or value is field.default:
            continue
        if isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type)):
            value = getattr(value, "__name__", type(value).__name__)
        elif isinstance(value, type):
            value = value.__name__
        elif isinstance(field.default, str | int | float | tuple) and value == field.default:
            continue
        shown[field.name] = str(value)
    return shown


def _variables(modules: Modules, variables: Mapping[str, Any]) -> Iterable[Finding]:
    paths = [path for path, _ in flatten({c: v for c, v in variables.items() if v})]
    for collection in variables:
        found = [path[1:] for path in paths if path[0] == collection]
        if collection in _RECORDED:
            kind, use = _RECORDED[collection]
            for path in dict.fromkeys(found):
                _, owner = _owner(modules, path)
                where = "/".join(path[:-1]) or "(the model)"
                reason = difference(f"Module.{kind}").what
                yield Finding(kind, str(path[-1]), owner, where, "native", use, reason)
        elif found:
            use, count = variable_use(collection), len(found)
            reason = f"{count} variable{'s' * (count > 1)}"
            where = "/".join(map(str, found[0])) + ("" if count == 1 else ", …")
            yield Finding("collection", collection, "", where, "native", use, reason)


def _sources(classes: Iterable[type]) -> tuple[list[Source], list[str]]:
    """The files of these classes, and what cannot be read."""
    files: dict[str, None] = {}
    problems = []
    for cls in sorted(classes, key=lambda cls: cls.__qualname__):
        try:
            files[inspect.getsourcefile(cls) or ""] = None
        except (OSError, TypeError):
            problems.append(f"{cls.__qualname__}: there is no source file to read")
    return [Source.parse(Path(f).name, Path(f).read_text("utf-8")) for f in files if f], problems
