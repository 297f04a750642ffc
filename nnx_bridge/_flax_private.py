"""The parts of Flax NNX that the functionaliser needs and that Flax does not document.

`nnx.split` and `nnx.merge` do not say which object of the merged module stands for which of the
one that was split, and `nnx.update` cannot add or remove attributes. The functions below them can.
They are used from here only; ``tests/nnx_bridge/test_flax_private.py`` checks them against the
behaviour that we rely on.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx
from flax.nnx import graphlib, reprlib, tracers

Indices = graphlib.RefMap
Nodes = graphlib.IndexMap
_CAPTURES = "__captures__"
_BOOKKEEPING = "_pytree__"


def flatten(node: Any) -> tuple[Any, list[tuple[Any, ...]], list[Any], Indices]:
    """The definition of a graph, paths and leaves (Variables, bare arrays), and the nodes'
    indices."""
    indices = graphlib.RefMap()
    graphdef, state = graphlib.flatten(node, ref_index=indices, graph=True)
    return graphdef, list(state.paths), list(state.leaves), indices


def unflatten(graphdef: Any, leaves: Sequence[Any]) -> tuple[Any, Nodes]:
    """A new graph that holds the leaves themselves, and its nodes by their indices."""
    nodes = graphlib.IndexMap()
    copy = graphlib.unflatten(graphdef, list(leaves), index_ref=nodes)
    return copy, nodes


def flatten_copy(copy: Any, nodes: Sequence[Any]) -> Any:
    """The definition of a graph that remembers the numbers of the ``nodes`` that the copy was made
    with."""
    indices = _indices(nodes)
    graphdef, _ = graphlib.flatten(copy, ref_outer_index=indices, graph=True)
    return graphdef


def update_graph(
    graphdef: Any, leaves: Sequence[Any], nodes: Sequence[Any], as_they_are: Sequence[Any]
) -> None:
    """Brings the ``nodes`` into the state that `flatten_copy` found their copies in.

    Nodes that are ``as_they_are`` stand among the ``leaves`` themselves, and are not updated.
    """
    indices = _indices(nodes)
    outer = graphlib.IndexMap.from_refmap(indices)
    for node in as_they_are:
        del outer[indices[node]]
    graphlib.unflatten(graphdef, list(leaves), outer_index_outer_ref=outer)


def is_graph_node(x: Any) -> bool:
    """Whether the graph mode looks for ``x`` in several places."""
    return bool(graphlib.is_graph_node(x))


def _indices(nodes: Sequence[Any]) -> Indices:
    return graphlib.RefMap.from_indexmap(graphlib.IndexMap(enumerate(nodes)))


def attributes(slots: dict[str, Any]) -> dict[str, Any]:
    """The attributes among the ``vars`` of an NNX object, without those in which NNX keeps its own
    books."""
    return {name: x for name, x in slots.items() if not is_bookkeeping(name)}


def is_bookkeeping(name: str) -> bool:
    """Whether NNX keeps an attribute of this name for itself."""
    return name.startswith(_BOOKKEEPING)


def rng_stream(variable: Any) -> str | None:
    """Name of the RNG stream that a Variable belongs to; None for one that is no RNG state."""
    # That something is no instance of a Variable type takes NNX longer to tell.
    if not variable.has_metadata("tag") or not isinstance(variable, nnx.RngState):
        return None
    tag: str | None = variable.get_metadata("tag")
    return tag


def same_metadata(a: nnx.Variable[Any], b: nnx.Variable[Any]) -> bool:
    """Whether two Variables have equal metadata, of which NNX gives out copies only."""
    return bool(a._var_metadata == b._var_metadata)


def captures_of_lists(paths: Sequence[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """Those ``paths`` that lead to what `nnx.capture` records for an `nnx.List` itself.

    A list's other keys are integers, and an `nnx.State` whose keys are of two types can neither be
    flattened by JAX nor by Flax.
    """
    captured = [path for path in paths if _CAPTURES in path]
    if not captured:
        return set()
    lists = {path[:i] for path in paths for i, key in enumerate(path) if isinstance(key, int)}
    return {path for path in captured if path[: path.index(_CAPTURES)] in lists}


@contextlib.contextmanager
def captures(module: nnx.Module, variables: Sequence[nnx.Variable[Any]]) -> Iterator[None]:
    """Lets ``sow`` and ``perturb`` of ``module`` find ``variables``, in front of those that it has.

    `nnx.capture` keeps one Variable for each type that it records in the attribute
    ``__captures__``.
    """
    outer = captured(module)
    types = {type(variable) for variable in variables}
    set_captured(module, (*variables, *(v for v in outer or () if type(v) not in types)))
    try:
        yield
    finally:
        set_captured(module, outer)


def captured(module: nnx.Module) -> tuple[nnx.Variable[Any], ...] | None:
    """The Variables in which ``module`` records, one for each type; None outside of a context."""
    return vars(module).get(_CAPTURES)


def trace_state() -> Any:
    """The JAX transform in progress; equal where it is the same one."""
    return tracers.TraceState()


def set_captured(module: nnx.Module, variables: Sequence[nnx.Variable[Any]] | None) -> None:
    """Makes ``variables`` those that `captured` finds."""
    if variables is not None:
        setattr(module, _CAPTURES, nnx.data(tuple(variables)))
    elif _CAPTURES in vars(module):
        delattr(module, _CAPTURES)


def is_captured(path: Sequence[Any]) -> bool:
    """Whether ``path`` leads to what `nnx.capture` records."""
    return _CAPTURES in path


def shown_class(kind: type) -> Any:
    """What ``__nnx_repr__`` yields first: the class of an NNX object."""
    return reprlib.Object(kind)


def shown_attribute(name: str, value: Any) -> Any:
    """What ``__nnx_repr__`` yields for an attribute of an NNX object."""
    return reprlib.Attr(name, value)
