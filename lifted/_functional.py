"""Functionalising: a stateful target as a pure function of its variables.

A *target* is something that owns variables: a bound Linen module, a `flax.core.Scope`, an NNX
module. `functionalize` takes a target or a pytree of targets and gives a `Functional`, on which the
transforms of this package stand:

    functional = functionalize(mdl)
    y, updates = functional(functional.variables, fn, *args)  # pure: may be traced, transformed
    functional.publish(updates)  # the one place where the caller's target is written

What differs between kinds of targets is in their groups; see `lifted._group`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from lifted._errors import Path, describe
from lifted._group import (
    Filter,
    Group,
    Updates,
    Variables,
    group_of,
    is_target,
    load_entry_points,
)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The pytree of targets, without the targets: where each stands, and of which kind it is."""

    treedef: Any
    kinds: tuple[type[Group], ...]

    @property
    def groups(self) -> list[tuple[type[Group], list[int]]]:
        """Each kind with the places of its targets."""
        return [
            (kind, [i for i, k in enumerate(self.kinds) if k is kind])
            for kind in dict.fromkeys(self.kinds)
        ]

    def split(self, tree: Any) -> list[list[Any]]:
        """For each kind what ``tree`` holds at the places of its targets."""
        flat = self.treedef.flatten_up_to(tree)
        return [[flat[i] for i in places] for _, places in self.groups]

    def join(self, parts: Iterable[Sequence[Any]]) -> Any:
        """The inverse of `split`."""
        flat: list[Any] = [None] * len(self.kinds)
        for (_, places), part in zip(self.groups, parts, strict=True):
            for place, value in zip(places, part, strict=True):
                flat[place] = value
        return self.treedef.unflatten(flat)

    def as_variables(self, tangents: Any, variables: Variables) -> Any:
        """Tangents of ``variables``, in any form that the user may choose, in the form of
        ``variables``.

        Raises:
          TypeError: the structure is not that of the targets.
        """
        if tangents is None:
            return None
        try:
            split = self.split(tangents)
        except (ValueError, TypeError):
            raise TypeError(
                "variable_tangents: expected the structure of mdl, with the tangents of each "
                f"target at its place and None where all are zero: {self.treedef}; got "
                f"{jax.tree.structure(tangents)}."
            ) from None
        both = zip(self.groups, split, self.split(variables), strict=True)
        return self.join(kind.as_variables(part, values) for (kind, _), part, values in both)


class Functional:
    """The pure function of the variables of a target, or of a pytree of targets; see the module's
    docstring.

    Attributes:
      variables: the variables of the target; for a pytree of targets a pytree of the same structure
        with the variables of each target at its place. A variable that several targets share stands
        at the first place only.
      structure: the structure of the pytree of targets.
      groups: the targets of each kind.
      initializing: whether variables that do not exist may be created, as inside Linen's ``init``.
    """

    def __init__(self, structure: Structure, groups: Sequence[Group]) -> None:
        self.structure = structure
        self.groups = groups
        self.variables = structure.join(group.variables for group in groups)
        self.initializing = any(group.initializing for group in groups)

    def __call__(
        self, variables: Variables, fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, list[Updates]]:
        """``fn(mdl, *args, **kwargs)`` with ``variables`` in the target.

        Args:
          variables: pytree of the structure of ``self.variables``.
          fn: function of the target and ``args``.
          *args: anything that ``fn`` takes.
          **kwargs: the same by keyword.

        Returns:
          ``(y, updates)``: the result of ``fn`` and what it wrote, for `publish`. The target itself
          is not touched.
        """
        with self.opened(variables) as (mdl, written):
            y = fn(mdl, *args, **kwargs)
            return y, written()

    @contextlib.contextmanager
    def opened(self, variables: Variables) -> Iterator[tuple[Any, Callable[[], list[Updates]]]]:
        """A context with a copy of the target that holds ``variables``, and a function that tells
        what was written to it. Neither outlives it.

        What `__call__` does, without the frame of a function around ``fn``: for every equation JAX
        walks the Python stack.
        """
        split = self.structure.split(variables)
        with contextlib.ExitStack() as stack:
            opened = [
                stack.enter_context(group.opened(part))
                for group, part in zip(self.groups, split, strict=True)
            ]
            copies = self.structure.join(copies for copies, _ in opened)
            yield copies, lambda: [written() for _, written in opened]

    def publish(self, updates: list[Updates]) -> None:
        """Writes what `__call__` returned as ``updates`` to the target."""
        for group, group_updates in zip(self.groups, updates, strict=True):
            group.publish(group_updates)

    def outside(self) -> list[dict[Path, Any]]:
        """What ``fn`` could write past the target that it is given, for each kind of target."""
        return [group.outside() for group in self.groups]

    def restore(self, outside: list[dict[Path, Any]]) -> None:
        """Undoes what was written since ``outside`` was asked for."""
        for group, state in zip(self.groups, outside, strict=True):
            group.restore(state)

    def match(self, variables: Variables, filter: Filter) -> Variables:
        """``variables`` with True at the leaves that ``filter`` selects and False at the others."""
        split = self.structure.split(variables)
        return self.structure.join(
            group.match(v, filter) for group, v in zip(self.groups, split, strict=True)
        )

    def prune(self, tree: Variables, mask: Variables) -> Variables:
        """``tree`` without the variables that ``mask`` has as False throughout."""
        split = zip(
            self.groups, self.structure.split(tree), self.structure.split(mask), strict=True
        )
        return self.structure.join(group.prune(t, m) for group, t, m in split)

    def extend(
        self, variables: Variables, updates: list[Updates], filter: Filter
    ) -> Variables | None:
        """``variables`` with those that ``updates`` created and ``filter`` selects; None where
        there are none."""
        split = list(zip(self.groups, self.structure.split(variables), updates, strict=True))
        extended = [group.extend(v, u, filter) for group, v, u in split]
        if all(e is None for e in extended):
            return None
        return self.structure.join(
            v if e is None else e for (_, v, _), e in zip(split, extended, strict=True)
        )

    def written(self, updates: list[Updates]) -> Variables:
        """The variables among ``updates``, in the form of ``variables``."""
        return self.structure.join(
            group.written(u) for group, u in zip(self.groups, updates, strict=True)
        )

    def per_scope(self, tree: Variables) -> list[Any]:
        """``tree`` as one tree for each scope, as Linen's ``multi_scope`` has it: those of a
        module's attributes first."""
        split = self.structure.split(tree)
        return [
            t for group, part in zip(self.groups, split, strict=True) for t in group.per_scope(part)
        ]

    def names(self, variables: Variables) -> list[str]:
        """What a filter can name, for messages."""
        split = self.structure.split(variables)
        return [n for group, v in zip(self.groups, split, strict=True) for n in group.names(v)]


def _kind(target: Any, mdl: Any) -> type[Group]:
    kind = group_of(target)
    if kind is None:
        where = "" if target is mdl else f" in {type(mdl).__name__}"
        raise TypeError(
            "mdl: expected a bound Linen module, a flax.core.Scope, an NNX module or a pytree of "
            f"these, got {target if isinstance(target, type) else describe(target)}{where}."
            + (
                f" Make an instance of it: {target.__name__}(...)."
                if isinstance(target, type)
                else ""
            )
        )
    return kind


def functionalize(
    mdl: Any, *, variables: Filter = True, frozen: Filter = False, rngs: Filter = True
) -> Functional:
    """The pure function of the variables of ``mdl``.

    The functional is what every transform of this package is made of. Use it to build one that is
    not here.

    Args:
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      variables: filter of the variables that are visible to the function and may be updated by it;
        what it leaves out is not visible inside. For Linen a collection filter: a bool, a name,
        names, or a ``DenyList``.
      frozen: filter of further variables that are visible but may not be updated.
      rngs: filter of the RNG streams that are visible.

    Returns:
      The `Functional`.

    Raises:
      TypeError: ``mdl`` has a leaf that is none of the kinds above.
      ValueError: a module is not bound.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> dense = nn.Dense(2)
      >>> x = jnp.ones(3)
      >>> bound = dense.bind(dense.init(jax.random.key(0), x))
      >>> functional = lifted.functionalize(bound)
      >>> pure = lambda variables, x: functional(variables, lambda mdl, x: mdl(x), x)[0]
      >>> jax.jacobian(pure)(functional.variables, x)["params"]["bias"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    targets, treedef = jax.tree.flatten(mdl, is_leaf=is_target)
    if not targets or not all(map(is_target, targets)):
        load_entry_points()
        targets, treedef = jax.tree.flatten(mdl, is_leaf=is_target)
    if not targets:
        raise TypeError(
            f"mdl: expected a module, a scope or a pytree of these, got {mdl!r}, which has none."
        )
    structure = Structure(treedef, tuple(_kind(target, mdl) for target in targets))
    groups: list[Group] = [
        kind([targets[i] for i in places], variables=variables, frozen=frozen, rngs=rngs)
        for kind, places in structure.groups
    ]
    return Functional(structure, groups)
