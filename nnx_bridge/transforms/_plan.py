"""Where the Variables of a lifted call go: Linen's collection filters as rules.

A rule says of the collections that its filter matches how they come into the lifted function and
how what is written to them comes out: along an axis, the same for all steps (broadcast), from step
to step (carry), or not at all. RNG streams follow ``split_rngs``.

The first rule that matches counts, as in Linen. That a later one *names* a collection too is a
mistake, which Linen passes over and which is an error here; only a filter that stands for "the
rest" (``True``, a ``DenyList``) may overlap.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx
from flax.core import DenyList
from flax.typing import In, Out

from lifted._errors import Path, path_text
from nnx_bridge import _flax_private
from nnx_bridge._variable_types import collection_name
from nnx_bridge.functional import Predicate, to_predicate
from nnx_bridge.transforms._targets import is_recorded


class Kept(enum.Enum):
    """How something is lifted that has no axis."""

    BROADCAST = "broadcast"
    CARRY = "carry"
    SPLIT = "split"  # A key, of which each step gets another one.
    NOWHERE = "nowhere"


Where = int | Kept


@dataclasses.dataclass(frozen=True)
class Rule:
    """One filter of collections and where it sends them.

    Attributes:
      argument: the argument of the transform, for messages: ``variable_axes={'params': 0}``.
      filter: of collections.
      into: how they come in.
      out: how they come out.
    """

    argument: str
    filter: Any
    into: Where
    out: Where
    matches: Predicate = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matches", to_predicate(self.filter))

    @property
    def is_rest(self) -> bool:
        """Whether the filter stands for whatever others leave."""
        return isinstance(self.filter, (bool, DenyList))


def rules_of_axes(name: str, variable_axes: Mapping[Any, Any], *, none: bool) -> list[Rule]:
    """The rules of ``variable_axes``.

    Args:
      name: of the transform.
      variable_axes: axis, `In` or `Out` by filter.
      none: whether None is an axis and means broadcast.

    Raises:
      TypeError: it is no mapping, or an axis is none.
    """
    if not isinstance(variable_axes, Mapping):
        raise TypeError(
            f"{name}: variable_axes: expected a dict from collections to axes, such as "
            f"{{'params': 0}}, got {variable_axes!r}."
        )
    rules = []
    for filter, given in variable_axes.items():
        argument = f"variable_axes={{{_text(filter)}: {given!r}}}"
        axis = given.axis if isinstance(given, (In, Out)) else given
        if axis is None and none:
            where: Where = Kept.BROADCAST
        elif isinstance(axis, int) and not isinstance(axis, bool):
            where = axis
        else:
            remedy = "None for one that all share" if none else "for one that all steps share use "
            remedy += "" if none else f"variable_broadcast={_text(filter)}"
            raise TypeError(f"{name}: {argument}: expected an int; {remedy}.")
        into = Kept.NOWHERE if isinstance(given, Out) else where
        out = Kept.NOWHERE if isinstance(given, In) else where
        rules.append(Rule(argument, filter, into, out))
    return rules


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rules of one transform.

    Attributes:
      name: of the transform.
      rules: of the collections, the first that matches counts.
      split_rngs: filters of RNG streams, and whether each step gets another key; None where there
        are no steps.
    """

    name: str
    rules: tuple[Rule, ...]
    split_rngs: tuple[tuple[Any, bool | None], ...]

    @classmethod
    def make(cls, name: str, rules: Iterable[Rule], split_rngs: Mapping[Any, bool]) -> "Plan":
        """A plan of the arguments of a transform.

        Raises:
          TypeError: ``split_rngs`` is no mapping to bools.
        """
        if not isinstance(split_rngs, Mapping):
            raise TypeError(
                f"{name}: split_rngs: expected a dict from RNG streams to bools, such as "
                f"{{'params': True}}, got {split_rngs!r}."
            )
        streams = [(filter, bool(split)) for filter, split in split_rngs.items()]
        return cls(name, tuple(rules), tuple(streams))

    @classmethod
    def whole(cls, name: str, variables: Any, rngs: Any) -> "Plan":
        """The plan of a transform that has no steps: the filters say what is visible."""
        rule = Rule(f"variables={variables!r}", variables, Kept.BROADCAST, Kept.BROADCAST)
        return cls(name, (rule,), ((rngs, None),))

    def creating(self) -> "Plan":
        """The plan by which a class makes its Variables: those that go from step to step are made
        once, and those that only come in, with the axis along which they do."""

        def made(rule: Rule) -> Rule:
            where = rule.into if rule.out is Kept.NOWHERE else rule.out
            into, out = (Kept.BROADCAST if w is Kept.CARRY else w for w in (rule.into, where))
            return Rule(rule.argument, rule.filter, into, out)

        rules = map(made, self.rules)
        return dataclasses.replace(self, rules=tuple(rules))

    @property
    def _rules_used(self) -> list[Rule]:
        return [rule for rule in self.rules if rule.filter is not False]

    @functools.cached_property
    def _rules_in(self) -> list[Rule]:
        return [rule for rule in self._rules_used if rule.into is not Kept.NOWHERE]

    @functools.cached_property
    def _rules_out(self) -> list[Rule]:
        return [rule for rule in self._rules_used if rule.out is not Kept.NOWHERE]

    @property
    def has_axes(self) -> bool:
        """Whether some collection has an axis."""
        return any(isinstance(w, int) for rule in self.rules for w in (rule.into, rule.out))

    @functools.cached_property
    def axes_out(self) -> list[int]:
        """The axes along which something may come out."""
        axes = {rule.out for rule in self.rules if isinstance(rule.out, int)}
        return sorted({0, *axes})  # New RNG streams come out along 0.

    def into(self, path: Path, leaf: Any) -> Where:
        """How a leaf of a target comes into the lifted function."""
        kind = type(leaf)  # What NNX's `isinstance` says takes it several times longer.
        if not issubclass(kind, nnx.Variable):
            return Kept.BROADCAST  # A bare array, which no filter names.
        if issubclass(kind, nnx.RngState):
            return self._into_stream(path, leaf)
        rule = self.rule_into(path, leaf)
        if rule is None:  # What is recorded inside without a rule is dropped.
            return Kept.BROADCAST if is_recorded(path, leaf) else Kept.NOWHERE
        return rule.into

    def rule_into(self, path: Path, leaf: Any) -> Rule | None:
        """The rule by which a Variable comes in."""
        return self._first(self._rules_in, path, leaf)

    def stream_rule(self, leaf: nnx.RngState) -> int | None:
        """The number of the entry of `split_rngs` that a stream follows."""
        names = {str(_flax_private.rng_stream(leaf)), _stream(leaf)}
        for i, (filter, _) in enumerate(self.split_rngs):
            if any(_names(filter, name) for name in names):
                return i
        return None

    def out(self, path: Path, leaf: Any, before: Where | None) -> Where:
        """How what was written to a leaf comes out; ``before`` is how it came in, None where it is
        new."""
        if not isinstance(leaf, nnx.Variable):
            return Kept.BROADCAST
        if isinstance(leaf, nnx.RngState):
            if before is not None:
                return before if isinstance(before, int) else Kept.BROADCAST
            number = self.stream_rule(leaf)
            split = number is not None and self.split_rngs[number][1]
            return 0 if split else Kept.BROADCAST
        rule = self._first(self._rules_out, path, leaf)
        return Kept.NOWHERE if rule is None else rule.out

    def unmapped(self, path: Path, leaf: Any, done: str) -> str:
        """Message for a Variable that no rule maps."""
        name, where = self.name, path_text(path)
        if isinstance(leaf, nnx.RngState):
            stream = _stream(leaf)
            return (
                f"{name}: {where} is {done}, state of the RNG stream {stream!r}, which split_rngs "
                f"does not name. Pass split_rngs={{{stream!r}: True}} for another key in each "
                f"step, or {{{stream!r}: False}} for the same key in all."
            )
        collection = collection_name(type(leaf))
        return (
            f"{name}: {where} is {done}, but {name} does not map its collection {collection!r}. "
            f"Pass {_REMEDIES[name].format(repr(collection))}."
        )

    def differs(self, where: str, leaf: Any) -> str:
        """Message for something that is the same for all steps, but not written so."""
        if not isinstance(leaf, nnx.Variable) or isinstance(leaf, nnx.RngState):
            remedy = "Make it a Variable of a collection that has an axis"
        else:
            remedy = f"Pass {_VARYING[self.name].format(repr(collection_name(type(leaf))))}"
        return (
            f"{self.name}: {where} is the same for all steps (broadcast), but what is written to "
            f"it differs from step to step. {remedy}; or write what does not depend on the step, "
            "such as a mean over the axis."
        )

    def _into_stream(self, path: Path, leaf: Any) -> Where:
        number = self.stream_rule(leaf)
        if number is None:
            return Kept.NOWHERE
        split = self.split_rngs[number][1]
        if split is None:
            return Kept.BROADCAST
        several = leaf.get_raw_value().ndim > 0
        if several and not split:
            stream = _stream(leaf)
            raise ValueError(
                f"{self.name}: {path_text(path)}: the RNG stream {stream!r} holds several keys, "
                f"one for each step, but split_rngs={{{stream!r}: False}} gives all the same one. "
                f"Pass split_rngs={{{stream!r}: True}}."
            )
        if several:
            return 0
        return Kept.SPLIT if split and isinstance(leaf, nnx.RngKey) else Kept.BROADCAST

    def _first(self, rules: list[Rule], path: Path, leaf: Any) -> Rule | None:
        found = [rule for rule in rules if rule.matches(path, leaf)]
        for other in found[1:]:
            if not other.is_rest:
                raise ValueError(
                    f"{self.name}: {path_text(path)}: the collection "
                    f"{collection_name(type(leaf))!r} is named by {found[0].argument} and by "
                    f"{other.argument}. Name it once."
                )
        return found[0] if found else None


# How collections are mapped: those that differ from step to step, and all.
_AXIS = "variable_axes={{{0}: 0}} for a value for each step"
_VARYING = {
    "vmap": _AXIS,
    "scan": _AXIS + ", or variable_carry={0} for one that goes from step to step",
    "while_loop": "carry_variables={0}",
}
_REMEDIES = _VARYING | {
    "vmap": _AXIS + ", or {{{0}: None}} for one of all",
    "scan": _VARYING["scan"] + ", or variable_broadcast={0} for one that stays the same",
    "cond": "variables={0}",
    "switch": "variables={0}",
}


def _stream(leaf: nnx.RngState) -> str:
    """The Linen name of a stream: ``default`` is what Linen calls ``params``, to which it falls
    back."""
    name = str(_flax_private.rng_stream(leaf))
    return "params" if name == "default" else name


def _names(filter: Any, name: str) -> bool:
    if isinstance(filter, bool):
        return filter
    if isinstance(filter, DenyList):
        return not _names(filter.deny, name)
    return name == filter if isinstance(filter, str) else name in filter


def _text(filter: Any) -> str:
    return filter.__name__ if isinstance(filter, type) else repr(filter)
