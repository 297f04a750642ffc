"""`match`: the proposal which arrays of Linen variables are which of an NNX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from lifted._errors import describe, path_text
from nnx_bridge._collections import Path, Variables
from nnx_bridge.weights._assemble import assembled
from nnx_bridge.weights._layouts import Layout
from nnx_bridge.weights._leaves import Leaf, Target, linen_leaves, module_classes, nnx_leaves
from nnx_bridge.weights._order import Calls, orders_of_use
from nnx_bridge.weights._paths import canonical
from nnx_bridge.weights._plan import Plan
from nnx_bridge.weights._problems import WeightsError, nearest
from nnx_bridge.weights._row import Row
from nnx_bridge.weights._rules import Rule, to_rules
from nnx_bridge.weights._search import Search
from nnx_bridge.weights._slots import Slot, linen_slot, nnx_slots


def match(
    variables: Variables,
    model: Any,
    rules: Iterable[Any] = (),
    *,
    calls: Calls | None = None,
    stack_axis: int | Mapping[str, int] | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    cast: Sequence[str] = (),
) -> Plan:
    """Proposes which arrays of Linen variables are which of an NNX model. Nothing is written.

    Use it to look at, or to save and edit, what `load` does, and to convert other trees of the same
    structure, such as the moments of an optimizer.

    Args:
      variables: Linen variables, boxed or not; arrays or `jax.ShapeDtypeStruct`.
      model: The NNX model, an abstract one (`nnx.eval_shape`), or its state. Of a state the classes
        of its modules are not known, and neither are their layouts.
      rules: `Rule` objects, tuples of their fields `(linen, nnx)` or `(linen, nnx, layout)`, or
        functions from a path in Linen to one in NNX (or None). The first that applies to a path
        wins, over all other evidence.
      calls: Two functions that call the models on equal inputs: of the Linen variables, and of the
        NNX model. They are traced, not run, and tell the order in which weights are used.
      stack_axis: The axis along which layers are stacked (`variable_axes` of `nn.scan`, `out_axes`
        of `nnx.vmap`), for all stacks or by the path of the list, where it does not follow from
        shapes.
      allow_missing: Patterns of paths in NNX that may stay as they are. `*` is any text.
      allow_extra: Patterns of paths in Linen that may be left behind.
      cast: Patterns of paths in NNX that take their values in another dtype.

    Returns:
      A plan, which may have `problems`: it is shown with them, and cannot be applied.

    Raises:
      TypeError: An argument is not what it should be.
      WeightsError: A rule leads to a path that the model does not have.

    Example:
        >>> import jax, numpy as np
        >>> from flax import linen as nn
        >>> cell = nn.OptimizedLSTMCell(3)
        >>> x = np.ones((1, 2))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> variables = cell.init(jax.random.key(0), carry, x)
        >>> plan = match(variables, nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0)))
        >>> plan.to_nnx(variables)["dense_h"]["kernel"].shape
        (3, 12)
    """
    if not isinstance(model, nnx.Module | nnx.State):
        raise TypeError(f"expected an NNX module or its state, got {describe(model)}")
    if calls is not None and (not isinstance(calls, Sequence) or len(calls) != 2):
        raise TypeError(
            "calls are two functions, one of the Linen variables and one of the NNX model; got "
            f"{describe(calls)}"
        )
    ours = linen_leaves(variables)
    theirs, ignored = nnx_leaves(model, {leaf.collection for leaf in ours})
    classes = module_classes(model)
    rows, linen, nnx_ = _ruled(ours, theirs, classes, to_rules(rules))
    order = orders_of_use(calls, variables, model) if calls is not None else None
    search = Search(linen, nnx_, classes, order)
    search.run(stack_axis)
    found, incomplete = assembled(search.pairs)
    place = {leaf.path: i for i, leaf in enumerate(ours)}
    rows = sorted([*rows, *found], key=lambda row: min(place[path] for path in row.linen))
    return Plan(
        tuple(rows),
        tuple(ours),
        tuple(theirs),
        (*search.undecided, *incomplete),
        tuple(ignored),
        _patterns("allow_missing", allow_missing),
        _patterns("allow_extra", allow_extra),
        _patterns("cast", cast),
    )


def _patterns(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise TypeError(f"{name} is a list of patterns, got one; write {name}=[{patterns!r}]")
    return tuple(patterns)


def _ruled(
    ours: Sequence[Leaf],
    theirs: Sequence[Target],
    classes: Mapping[Path, type],
    rules: Sequence[Rule],
) -> tuple[list[Row], list[Slot], list[Slot]]:
    """The rows that rules make, and the remaining slots of both sides under the names that rules
    give them."""
    paths = [target.path for target in theirs] if rules else []
    known = {name for p in paths for i in range(len(p) + 1) for name in _names(p[:i])}
    # What rules have not taken yet, by the text of its path.
    free_linen = {path_text(leaf.path): leaf.path for leaf in ours}
    free_nnx = {path_text(target.path): target.path for target in theirs}
    taken: set[tuple[str, Path]] = set()
    rows: list[Row] = []
    targets: dict[Path, tuple[Path, Path]] = {}
    for leaf in ours:
        for rule in rules:
            found = rule.target(leaf.path)
            if found is None:
                continue
            if not known.intersection(_names(found[0])):
                near = nearest(found[0], {t.path[: len(found[0])] for t in theirs})
                raise WeightsError(
                    f"a rule makes {path_text(leaf.path)} {path_text((*found[0], *found[1]))}, "
                    f"but the model has no {path_text(found[0])}{near}"
                )
            if rule.layout is None:
                targets[leaf.path] = found
            elif ("Linen", leaf.path) not in taken:
                text = path_text((*found[0], *found[1]))
                row = _row_of_rule(rule, rule.layout, leaf.path, text, free_linen, free_nnx)
                rows.append(row)
                taken.update(("Linen", path) for path in row.linen)
                taken.update(("NNX", path) for path in row.nnx)
                for path in row.linen:
                    free_linen.pop(path_text(path), None)
                del free_nnx[text]
            break
    zones = {target: _zone(target, known) for target, _ in targets.values()}
    linen = []
    for leaf in ours:
        if ("Linen", leaf.path) in taken:
            continue
        target, below = targets.get(leaf.path, (None, ()))
        renamed = None if target is None else (*target, *below)
        linen.append(linen_slot(leaf, renamed, zones[target] if target else None))
    free = [target for target in theirs if ("NNX", target.path) not in taken]
    nnx = nnx_slots(free, classes, [slot.path for slot in linen])
    used = set(zones.values())
    return rows, linen, [_in_zone(slot, used) for slot in nnx]


def _names(path: Path) -> list[Any]:
    """The names of a path: its own, and that without the places in lists, which a stack has not."""
    outside = tuple(key for key in path if not str(key).isdigit())
    return [canonical(path), canonical(outside)]


def _zone(target: Path, known: set[Any]) -> Any:
    return next(name for name in _names(target) if name in known)


def _row_of_rule(
    rule: Rule,
    layout: Layout,
    path: Path,
    target: str,
    free_linen: Mapping[str, Path],
    free_nnx: Mapping[str, Path],
) -> Row:
    """The row of a rule that says itself how the arrays lie."""
    texts = rule.siblings(path)
    what = f"a rule makes {' + '.join(texts or [path_text(path)])} {target}"
    for text in texts or ():
        if text not in free_linen:
            near = nearest((text,), free_linen.values())
            raise WeightsError(f"{what}, but Linen has no {text} that is free{near}")
    if target not in free_nnx:
        near = nearest((target,), free_nnx.values())
        raise WeightsError(f"{what}, but the model has no array there that is free{near}")
    linen = tuple(free_linen[text] for text in texts) if texts else (path,)
    return Row(linen, (free_nnx[target],), layout, why="with its layout")


def _in_zone(slot: Slot, zones: set[Any]) -> Slot:
    """The slot in the innermost of the zones that it is in."""
    for end in range(len(slot.path), 0, -1) if zones else ():
        for name in _names(slot.path[:end]):
            if name in zones:
                return dataclasses.replace(slot, zone=name)
    return slot
