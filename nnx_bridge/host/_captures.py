"""What hosted models sow and perturb, in the capture context of the NNX modules around them.

Linen keeps what it sows in collections, NNX in Variables of the module that sows. Before a call of
a host, what its nodes have recorded so far becomes collections, so that Linen goes on from there
(a reduction is Linen's own); after the call the collections go back into the nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from flax import linen as nn
from flax import nnx

from lifted._trees import identical
from nnx_bridge import _flax_private
from nnx_bridge._collections import Path, Variables, nest
from nnx_bridge._variable_types import collection_name
from nnx_bridge.host._binding import path_of
from nnx_bridge.host._tree import Level, node_at, nodes

Recorded = dict[str, dict[str, Any]]


def recorded(root: nnx.Module) -> Recorded:
    """The collections that a context around the call records, with what they hold so far."""
    if _flax_private.captured(root) is None:
        return {}
    held = [
        ((collection_name(type(variable)), *path), recorded_values(variable))
        for path, node in nodes(root)
        for variable in _flax_private.captured(node) or ()
    ]
    values = nest(((*path, name), value) for path, of in held for name, value in of.items())
    return {path[0]: values.get(path[0], {}) for path, _ in held}


def deposit(root: nnx.Module, collections: Variables, modules: Sequence[Path]) -> None:
    """Records what the call has left in ``collections``, those of `recorded`.

    Args:
      root: the host.
      collections: what the call left.
      modules: paths of the Linen modules; below them a dictionary is a value.
    """
    there = dict(nodes(root))
    native = [path for path, node in there.items() if not isinstance(node, Level)]
    known = {path[:depth] for path in (*modules, *native) for depth in range(len(path) + 1)}
    for collection, tree in collections.items():
        for path, name, value in _by_module(tree, (), known):
            node = there.get(path)
            if node is None:
                assert isinstance(root, Level)
                node = there[path] = node_at(root, path)
            for variable in _captured_as(root, node):
                # A perturbation that was given may belong to another trace: it is not written.
                held = recorded_values(variable).get(name)
                if collection_name(type(variable)) == collection and not identical(held, value):
                    variable[name] = value


@contextlib.contextmanager
def called_modules(paths: list[Path]) -> Iterator[None]:
    """Adds to ``paths`` those of the Linen modules whose methods run."""

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = path_of(context.module)
        if path is not None:
            paths.append(path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield


def recorded_values(variable: nnx.Variable[Any]) -> dict[str, Any]:
    """What a Variable of a capture context holds, by name."""
    return dict(dict.items(variable.get_value()))


def _by_module(
    tree: Mapping[str, Any], path: Path, known: Set[Path]
) -> Iterator[tuple[Path, str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and (*path, name) in known:
            yield from _by_module(value, (*path, name), known)
        else:
            yield path, name, value


def _captured_as(root: nnx.Module, node: nnx.Module) -> tuple[nnx.Variable[Any], ...]:
    """What ``node`` records; one that is new records what the root does."""
    of_root = _flax_private.captured(root) or ()
    if _flax_private.captured(node) is None:
        _flax_private.set_captured(node, [type(v)(type(v.get_value())()) for v in of_root])
    return _flax_private.captured(node) or ()
