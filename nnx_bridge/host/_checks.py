"""What is wrong with the variables or the inputs of a hosted model, said by path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from lifted._errors import describe, path_text, suggestion
from lifted._nested import flat
from nnx_bridge._collections import Path, Variables

# Linen raises these where the variables are not those of the module.
_OF_VARIABLES = (
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeCollectionNotFound,
    errors.ScopeVariableNotFoundError,
)
# How many lines a message lists of one kind.
_LISTED = 8


def check_method(module: Any, method: Any) -> None:
    """Raises AttributeError for the name of a method that a module does not have."""
    if isinstance(method, str) and not hasattr(module, method):
        cls = type(module)
        common = {*dir(nn.Module), *getattr(cls, "__dataclass_fields__", ())}
        own = [n for n in dir(cls) if n not in common and callable(getattr(cls, n, None))]
        known = suggestion(method, ["__call__", *(n for n in own if not n.startswith("_"))])
        raise AttributeError(f"{cls.__name__} has no method {method!r}; {known}")


def explain(
    error: Exception,
    module: nn.Module,
    variables: Variables,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Any,
    native: frozenset[Path],
) -> None:
    """Adds to an error of Linen the module that raised it, and how the variables are wrong."""
    path = _raised_in(error)
    if path:
        error.add_note(f"Raised in the Linen module {path}.")
    if isinstance(error, _OF_VARIABLES):
        try:
            problems = differences(module, variables, args, kwargs, method, native)
        except Exception:  # noqa: BLE001  (The inputs are wrong too: the first error says enough.)
            return
        if problems:
            error.add_note("\n".join(["The variables are not those of the module:", *problems]))


def differences(
    module: nn.Module,
    variables: Variables,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: Any,
    native: frozenset[Path] = frozenset(),
) -> list[str]:
    """How variables differ from those that `module.init` makes for a call, a line for each.

    Args:
      module: the Linen module.
      variables: the variables.
      args: positional arguments of the call.
      kwargs: keyword arguments of the call.
      method: the method that is called.
      native: paths of modules that do not belong to the Linen module any more.
    """

    def init(*args: Any, **kwargs: Any) -> Any:
        return module.init(jax.random.key(0), *args, method=method, **kwargs)

    expected = _by_path(abstractly(init, args, kwargs), native)
    found = _by_path(variables, native)
    # What a model has recorded, and what it was never asked to keep, may be there or not.
    optional = {"intermediates", "perturbations", "cache"}
    missing = [p for p in expected.keys() - found.keys() if p[0] not in optional]
    extra = [p for p in found.keys() - expected.keys() if p[0] not in optional]
    if extra and all(("params", *path) in missing for path in extra):
        return ["  these are parameters without their collection: write {'params': parameters}"]
    lines = _listed("missing", missing, extra) + _listed("not of this module", extra, missing)
    for path in sorted(expected.keys() & found.keys()):
        want, have = jnp.shape(expected[path]), jnp.shape(found[path])
        if want != have:
            lines.append(f"  {path_text(path)}: expected shape {want}, found {have}")
    return lines


def abstractly(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`jax.eval_shape` of a call whose arguments need not be arrays all of them."""
    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")  # noqa: E731
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))

    def run(arrays: list[Any]) -> Any:
        given = iter(arrays)
        full = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(treedef, full)
        return fn(*args, **kwargs)

    return jax.eval_shape(run, [leaf for leaf in leaves if is_array(leaf)])


def not_finite(variables: Variables) -> list[str]:
    """The variables with NaNs or infinities, a line for each."""
    lines = []
    for path, value in sorted(_by_path(variables, frozenset()).items()):
        if jnp.issubdtype(getattr(value, "dtype", jnp.int32), jnp.inexact):
            nans, infinite = int(jnp.isnan(value).sum()), int(jnp.isinf(value).sum())
            if nans or infinite:
                lines.append(
                    f"  {path_text(path)}: {nans} NaN and {infinite} infinite of {value.size} "
                    f"elements, {describe(value)}"
                )
    return lines


def _listed(what: str, paths: list[Path], others: list[Path]) -> list[str]:
    names = [path_text(path) for path in others]
    lines = []
    for path in sorted(paths)[:_LISTED]:
        near = difflib.get_close_matches(path_text(path), names, n=1)
        hint = f" (the nearest on the other side: {near[0]})" if near else ""
        lines.append(f"  {what}: {path_text(path)}{hint}")
    if len(paths) > _LISTED:
        lines.append(f"  {what}: {len(paths) - _LISTED} more")
    return lines


def _by_path(variables: Variables, native: frozenset[Path]) -> dict[Path, Any]:
    return {
        path: value
        for path, value in flat(nn.meta.unbox(variables), ())
        if not any(path[1 : len(p) + 1] == p for p in native)
    }


def _raised_in(error: Exception) -> str:
    """The innermost Linen module whose method raised an error."""
    traceback, found = error.__traceback__, ""
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module.scope is not None and module.scope.path:
            found = f"{path_text(tuple(module.scope.path))} ({type(module).__name__})"
        traceback = traceback.tb_next
    return found
