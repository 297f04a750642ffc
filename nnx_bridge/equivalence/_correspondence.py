"""Which variable, and which module, of one model stands for which of another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from flax import linen as nn

from lifted._errors import path_text, suggestion
from nnx_bridge._collections import Path, Variables, flatten, nest

Renaming: TypeAlias = Mapping[str, str] | Callable[[str], str] | None


@runtime_checkable
class Correspondence(Protocol):
    """How the variables of a reference become those of a model, and back.

    Variables are nested dicts by collection, as Linen has them, without boxes; those of an NNX
    module stand at the path of its attributes, below the collection of their type. Anything with
    these three methods serves, such as a plan that fuses or transposes kernels.
    """

    def to_model(self, variables: Variables) -> dict[str, Any]:
        """The variables of the model that the reference has a value for; JAX may trace it."""

    def to_reference(self, variables: Variables) -> dict[str, Any]:
        """The variables of the reference, but parameters, that the model has a value for."""

    def module(self, path: str) -> str:
        """The path of the reference's module that the model's module at `path` stands for."""


class Problematic(NamedTuple):
    """A variable without a partner, or with one that does not fit."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    missing: bool
    misfit: bool
    why: str


def renamed(path: str, renaming: Renaming) -> str:
    """A path of the reference in the model's words: the longest prefix in the mapping counts."""
    if renaming is None:
        return path
    if callable(renaming):
        return renaming(path)
    parts = path.split("/")
    for end in range(len(parts), 0, -1):
        new = renaming.get("/".join(parts[:end]))
        if new is not None:
            return "/".join([*filter(None, new.split("/")), *parts[end:]])
    return path


def normal(path: str) -> str:
    """A path in the form in which Linen's and NNX's agree: `layers/0/if_` is `layers_0/if`."""
    joined = re.sub(r"/(\d+)(?=/|$)", r"_\1", path)
    return "/".join(part.rstrip("_") or part for part in joined.split("/"))


class Paths:
    """Equal paths stand for each other; so do those that differ in spelling only.

    Args:
      reference: The variables of the reference (or their shapes).
      model: The variables of the model.
      renaming: Paths of the reference to paths of the model, without the collection: a dict from
        prefix to prefix (`{"Dense_0": "first"}`), or a function.
    """

    def __init__(self, reference: Variables, model: Variables, renaming: Renaming = None) -> None:
        self._renaming = renaming
        ours, theirs = dict(flatten(reference)), dict(flatten(model))
        names = {path: renamed(path_text(path[1:]), renaming) for path in ours}
        partners = _partners(names, theirs)
        left = set(theirs) - set(partners.values())
        self._pairs: dict[Path, Path] = {}  # From the reference to the model.
        self.problems: list[Problematic] = []
        modules: dict[str, str] = {}
        for path, value in ours.items():
            name, partner = names[path], partners.get(path)
            if partner is None:
                known = [path_text(p) for p in theirs if p[0] == path[0]]
                wanted = path_text((path[0], name))
                why = f"the model has no {wanted}; {_few(suggestion(wanted, known))}"
                self.problems.append(_problem(path, value, why, missing=True))
            elif np.shape(value) != np.shape(theirs[partner]):
                shapes = f"{list(np.shape(value))}, in the model {list(np.shape(theirs[partner]))}"
                at = path_text(partner)
                why = f"its shape is {shapes}" + (f" (at {at})" if partner != path else "")
                self.problems.append(_problem(path, value, why, misfit=True))
            else:
                self._pairs[path] = partner
            module = renamed(path_text(path[1:-1]), renaming)
            modules[module] = path_text(path[1:-1])
            modules.setdefault(normal(module), modules[module])
        known = [path_text(p) for p in ours]
        # A collection that only the model has shows in what it computes, or not at all.
        compared = {"params", *(path[0] for path in ours)}
        for path in (path for path in theirs if path in left and path[0] in compared):
            why = f"the reference has none; {_few(suggestion(path_text(path), known))}"
            self.problems.append(_problem(path, theirs[path], why))
        self._modules = modules
        self._prefixes = {
            path_text(path[1:end]) for path in ours for end in range(2, len(path) + 1)
        }
        self.found_any = bool(self._pairs) or not ours

    def unused(self, modules: Iterable[str]) -> Iterator[str]:
        """What is wrong with prefixes in the renaming that fit nothing in the reference.

        Args:
          modules: Paths of the modules of the reference, also of those without variables.
        """
        known = self._prefixes | set(modules)
        for prefix in self._renaming if isinstance(self._renaming, Mapping) else ():
            if prefix not in known:
                near = _few(suggestion(prefix, sorted(known - {""})))
                yield f"correspondence: no path of the reference begins with {prefix!r}; {near}"

    def to_model(self, variables: Variables) -> dict[str, Any]:
        values = dict(flatten(variables))
        return nest((self._pairs[p], value) for p, value in values.items() if p in self._pairs)

    def to_reference(self, variables: Variables) -> dict[str, Any]:
        values = dict(flatten(variables))
        return nest((p, values[q]) for p, q in self._pairs.items() if q in values)

    def module(self, path: str) -> str:
        if path in self._modules:
            return self._modules[path]
        name = normal(path)
        if name in self._modules or not isinstance(self._renaming, Mapping):
            return self._modules.get(name, name)
        # A module without variables, or one above those that have some.
        for old, new in self._renaming.items():
            if name == normal(new) or name.startswith(f"{normal(new)}/"):
                return f"{old}{name[len(normal(new)) :]}"
        return name


def _partners(names: Mapping[Path, str], theirs: Iterable[Path]) -> dict[Path, Path]:
    """The paths that stand for each other, where any do; equal ones before those like each other.

    Args:
      names: What each path of the reference, without its collection, is in the model's words.
      theirs: The paths of the model.
    """
    found: dict[Path, Path] = {}
    left = list(theirs)
    for spelled in (str, normal):
        by_name = {(path[0], spelled(path_text(path[1:]))): path for path in left}
        for path, name in names.items():
            partner = by_name.pop((path[0], spelled(name)), None) if path not in found else None
            if partner is not None:
                found[path] = partner
        left = list(by_name.values())
    return found


def unboxed(variables: Variables) -> dict[str, Any]:
    """Variables without the boxes of their metadata."""
    return {name: nn.meta.unbox(tree) for name, tree in variables.items()}


def merged(base: Variables, changes: Variables) -> dict[str, Any]:
    """Nested dicts with the values of `changes` in the place of those of `base`."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


def arrays_of(variables: Variables) -> Iterator[tuple[str, Any]]:
    """The arrays of variables by their paths."""
    for path, value in jax.tree_util.tree_leaves_with_path(dict(variables)):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), value


def _problem(
    path: Path, value: Any, why: str, *, missing: bool = False, misfit: bool = False
) -> Any:
    dtype = str(getattr(value, "dtype", type(value).__name__))
    return Problematic(path_text(path), tuple(np.shape(value)), dtype, missing, misfit, why)


def _few(text: str) -> str:
    """A suggestion without a long list of what is known."""
    return text if len(text) < 200 else f"{text[:200]}..."
