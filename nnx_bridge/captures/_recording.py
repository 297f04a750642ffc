"""Recording what modules sow and where they perturb, without a mark on any module of the caller's.

`record` runs inside a functional call, on copies of the caller's modules. NNX modules get the
context that `nnx.capture` would give them, so that `nnx.Module.sow` and ``perturb`` find it; Linen
modules get scopes in which the recorded collections are empty and mutable. When the call ends, by
return or by exception, the copies are as before.

Contexts nest: what is sown goes to the innermost context that records its type. A context leaves
the types that it does not record to the one around it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core.scope import Scope, union_filters

from lifted._group import is_target
from lifted._linen import LinenGroup, LinenUpdates
from lifted._nested import Collections
from nnx_bridge import _flax_private
from nnx_bridge._names import linen_names
from nnx_bridge._variable_types import collection_name, variable_type
from nnx_bridge.captures._method_outputs import sowing_outputs
from nnx_bridge.captures._records import Perturbations, Records
from nnx_bridge.host._marks import traced_anew
from nnx_bridge.host._node import Node
from nnx_bridge.host._tree import node_at

_BROADCAST = (
    "If this is what a module records: it differs from example to example, but the module is "
    "broadcast. Say where the mapped axis of recorded values goes: "
    "in_axes=(nnx.StateAxes({(nnx.Intermediate, nnx.Perturbation): 0, ...: None}), ...)."
)

Kind = str | type[nnx.Variable[Any]]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What is recorded.

    Attributes:
      kinds: Variable types or names of collections, each standing for the other.
      seeds: for each target the values that recorded Variables start with: an `nnx.State` for an
        NNX module, ``{collection: ...}`` for a Linen module. A collection with seeds is only read.
      outputs: ``outputs(module, method_name)`` says which outputs of methods are sown, as the first
        of ``kinds``; None for none.
    """

    kinds: tuple[Kind, ...]
    seeds: Sequence[Any] | None = None
    outputs: Callable[[Any, str], bool] | None = None


def record(fn: Callable[[Any], Any], mdl: Any, recording: Recording) -> tuple[Any, list[Any]]:
    """The result of ``fn(mdl)``, and what was recorded.

    Args:
      fn: function of a pytree of targets.
      mdl: the targets; they belong to the functional call in which this runs.
      recording: what to record.

    Returns:
      ``(y, recorded)``; for each kind a pytree of the structure of ``mdl`` with an `nnx.State` in
      the place of an NNX module, and the content of the collection in the place of a Linen module.
    """
    targets, treedef = jax.tree.flatten(mdl, is_leaf=is_target)
    structure: Any = treedef
    linen = [i for i, target in enumerate(targets) if isinstance(target, (nn.Module, Scope))]
    native = [i for i in range(len(targets)) if i not in linen]
    seeds = recording.seeds or [None] * len(targets)

    linen_targets, linen_seeds = [targets[i] for i in linen], [seeds[i] for i in linen]
    with contextlib.ExitStack() as stack:
        copies, read_linen = stack.enter_context(
            _linen_records(linen_targets, recording, linen_seeds)
        )
        by_place = dict(enumerate(targets)) | dict(zip(linen, copies, strict=True))
        of_nnx = [by_place[i] for i in native]
        read_nnx = stack.enter_context(_captures(of_nnx, recording, [seeds[i] for i in native]))
        try:
            y = fn(structure.unflatten([by_place[i] for i in range(len(targets))]))
        except ValueError as error:
            if "axis spec None" in str(error):
                error.add_note(_BROADCAST)
            raise
        of_native, of_linen = read_nnx(), read_linen()
    recorded = []
    for native_trees, linen_trees in zip(of_native, of_linen, strict=True):
        trees = dict(zip([*native, *linen], [*native_trees, *linen_trees], strict=True))
        recorded.append(structure.unflatten([trees[i] for i in range(len(targets))]))
    return y, recorded


def _type(kind: Kind) -> type[nnx.Variable[Any]]:
    return variable_type(kind) if isinstance(kind, str) else kind


def collection(kind: Kind) -> str:
    """Name of the Linen collection of a kind."""
    return kind if isinstance(kind, str) else collection_name(kind)


def _modules(targets: Sequence[Any]) -> list[tuple[int, tuple[Any, ...], nnx.Module]]:
    """The modules of all targets, each once, with its target and its path there."""
    found: dict[int, tuple[int, tuple[Any, ...], nnx.Module]] = {}
    for i, target in enumerate(targets):
        for path, module in nnx.iter_modules(target, graph=True):
            found.setdefault(id(module), (i, path, module))
    return list(found.values())


@contextlib.contextmanager
def _captures(
    targets: Sequence[Any], recording: Recording, seeds: Sequence[Any]
) -> Iterator[Callable[[], list[list[nnx.State]]]]:
    """Gives the modules a context of `nnx.capture`; yields a function that reads for each kind what
    each target recorded."""
    types = tuple(_type(kind) for kind in recording.kinds)
    started: dict[Any, list[tuple[Any, nnx.Variable[Any]]]] = {}
    for i, (target, seed) in enumerate(zip(targets, seeds, strict=True)):
        for path, variable in nnx.to_flat_state(seed) if seed is not None else ():
            _check_seed(target, path)
            started.setdefault((i, path[:-1]), []).append((path[-1], variable))
    modules = _modules(targets)
    with contextlib.ExitStack() as stack:
        has_hosts = any(isinstance(module, Node) for _, _, module in modules)
        if has_hosts:
            known = {id(module) for _, _, module in modules}
            stack.callback(_leave_new, targets, known, set(types))
        for i, path, module in modules:
            own: dict[Any, dict[Any, Any]] = {kind: {} for kind in types}
            for name, variable in started.get((i, tuple(path)), ()):
                own.setdefault(type(variable), {})[name] = variable.get_value()
            variables = tuple(
                _recorded(
                    kind, (Perturbations if issubclass(kind, nnx.Perturbation) else Records)(values)
                )
                for kind, values in own.items()
            )
            stack.enter_context(_flax_private.captures(module, variables))
        if recording.outputs is not None:
            # Of a host the methods of its Linen modules count, not its own.
            native = [module for _, _, module in modules if not isinstance(module, Node)]
            stack.enter_context(sowing_outputs(native, types[0], recording.outputs))
            stack.enter_context(_linen_outputs(recording.outputs, collection(recording.kinds[0])))

        def read() -> list[list[nnx.State]]:
            flat: dict[Any, list[list[Any]]] = {kind: [[] for _ in seeds] for kind in types}
            for i, path, module in _modules(targets) if has_hosts else modules:
                for variable in _flax_private.captured(module) or ():
                    if type(variable) in flat:
                        values = dict.items(variable.get_raw_value())
                        of_target = flat[type(variable)][i]
                        of_target += [((*path, n), _recorded(type(variable), x)) for n, x in values]
            return [
                [nnx.from_flat_state(f) if f else nnx.State({}) for f in flat[kind]]
                for kind in types
            ]

        yield read


def _recorded(kind: type[nnx.Variable[Any]], value: Any) -> nnx.Variable[Any]:
    """A Variable of what is recorded, whatever the kind that new Variables have by default."""
    return kind(value, ref=False, hijax=False)


def _check_seed(target: Any, path: tuple[Any, ...]) -> None:
    """Checks that a seed belongs to a module; a host may get the node of it.

    Raises:
      ValueError: there is no such module.
    """
    module = target
    for i, name in enumerate(path[:-1]):
        if isinstance(module, Node):
            node_at(module, linen_names(path[i:-1]))
            return
        try:
            module = module[name] if isinstance(name, int) else vars(module)[name]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"init: {'/'.join(map(str, path))}: {type(target).__name__} has no module at "
                f"{'/'.join(map(str, path[: i + 1]))!r}. Take the state of a capture of the same "
                "module."
            ) from None


def _leave_new(targets: Sequence[Any], known: set[int], types: set[Any]) -> None:
    """Takes the context from nodes that a hosted model got while it lasted."""
    for _, _, module in _modules(targets):
        held = _flax_private.captured(module)
        if id(module) not in known and held is not None:
            others = [variable for variable in held if type(variable) not in types]
            _flax_private.set_captured(module, others or None)


@contextlib.contextmanager
def _linen_records(
    targets: Sequence[Any], recording: Recording, seeds: Sequence[Any]
) -> Iterator[tuple[list[Any], Callable[[], list[list[Any]]]]]:
    """A context with copies of Linen targets; yields them and a function that reads for each kind
    what each of them recorded, and writes the rest to the targets."""
    names = [collection(kind) for kind in recording.kinds]
    if not targets:
        yield [], lambda: [[] for _ in names]
        return
    started = [seed or {} for seed in seeds]
    group = _RecordingGroup(targets, tuple(names), {col for seed in started for col in seed})
    variables = [{**own, **seed} for own, seed in zip(group.variables, started, strict=True)]
    with group.opened(variables) as (copies, written):

        def read() -> list[list[Any]]:
            updates = written()
            trees = group.written(updates)
            kept = [{c: v for c, v in root.items() if c not in names} for root in updates.variables]
            group.publish(LinenUpdates(kept, updates.static))
            return [[tree.get(name, {}) for tree in trees] for name in names]

        yield copies, read


class _RecordingGroup(LinenGroup):
    """Linen targets whose recorded collections are empty and mutable inside a call."""

    def __init__(self, targets: Sequence[Any], names: tuple[str, ...], seeded: set[str]) -> None:
        super().__init__(targets, variables=True, frozen=False, rngs=True)
        self._recorded = [name for name in names if name not in seeded]
        self.variables = [
            {col: values for col, values in tree.items() if col not in names}
            for tree in self.variables
        ]

    def _open(self, root: Any, collections: Collections) -> Scope:
        scope = super()._open(root, collections)
        scope.mutable = union_filters(scope.mutable, self._recorded)
        return scope


@contextlib.contextmanager
def _linen_outputs(outputs: Callable[[Any, str], bool], name: str) -> Iterator[None]:
    """Sows the outputs of the Linen methods that ``outputs`` selects."""

    def sow(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if context.method_name != "setup" and outputs(context.module, context.method_name):
            context.module.sow(name, context.method_name, y)
        return y

    with nn.intercept_methods(sow), traced_anew():
        yield
