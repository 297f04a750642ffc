"""What the tagged values of a run belong to: calls of modules with names, and steps of loops.

A module that is called in a loop has one call for each step: `layers/attention (step 3)`. A loop
may be long, so the steps after the first `_STEPS` are taken together. That is enough to find the
place of a fault, which as a rule shows in the first step.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnx_bridge.equivalence._arrays import Arrays
from nnx_bridge.equivalence._recording import Tag
from nnx_bridge.equivalence._tags import Tagged

# How many steps of a loop are looked at one by one.
_STEPS = 16

# What is recorded, in the words of a report.
PARTS = {"input": "layer input", "output": "layer output", "sown": "sown value"}

# Which of the calls in branches ran; no arrays to compare.
RAN = "calls that ran"


class Call(NamedTuple):
    """One call of a module.

    Attributes:
      module: The class of the module.
      begun: How many calls had begun when it began.
      ended: How many calls had ended by then.
    """

    module: str
    begun: int
    ended: int


@dataclasses.dataclass
class _Run:
    """One call, all its steps together: the places of its tags among those that were found."""

    tag: Tag
    stack: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    in_branch: bool
    arrays: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    name: str | None = None

    @property
    def all_steps(self) -> str:
        """The name of the call, for all its steps."""
        loops = f" (steps {'x'.join(map(str, self.stack))})" if self.stack else ""
        return f"{self.name}{loops}"

    def key(self, leaf: str) -> str:
        """The name of an array of all steps."""
        return f"{self.all_steps} [{leaf}]"


class _Array(NamedTuple):
    """An array of a call: of all its steps, and what it looks like."""

    run: _Run
    leaf: str
    place: int
    aval: Any


class Calls:
    """The calls of one run.

    Args:
      found: What is tagged in it.

    Attributes:
      calls: The calls by their names, each step of a loop one, in the order in which they ended.
      sown: The names of what is sown, each step of a loop one.
    """

    def __init__(self, found: Sequence[Tagged]) -> None:
        runs = _runs(found)
        self._numbers = _numbers(runs)
        self._arrays: dict[str, dict[str, _Array]] = {what: {} for what in PARTS.values()}
        stacks: dict[int | None, Any] = {run.tag.number: run.stack for run in runs}
        counts: dict[Any, int] = {}
        for run in runs:
            if stacks.get(run.tag.inside) == run.stack:
                # The same call, as a parent class or a transform makes it again.
                continue
            count = counts[run.tag.name, run.stack] = counts.get((run.tag.name, run.stack), 0) + 1
            run.name = run.tag.name if count == 1 else f"{run.tag.name} (call {count})"
            for (part, leaf), place in run.arrays.items():
                aval = jax.typeof(found[place].value)
                self._arrays[PARTS[part]][run.key(leaf)] = _Array(run, leaf, place, aval)
        named = [run for run in runs if run.name is not None]
        self.calls = dict(_in_order([run for run in named if run.tag.part != "sown"]))
        self.sown = tuple(name for name, _ in _in_order([r for r in named if r.tag.part == "sown"]))

    def arrays(self, found: Sequence[Tagged]) -> dict[str, Arrays]:
        """What is recorded in the program that this was made from, of all steps together."""
        taken = [array for arrays in self._arrays.values() for array in arrays.values()]
        ran = {a.run.all_steps: found[a.place].ran for a in taken if a.run.in_branch}
        values = {
            what: {key: found[array.place].value for key, array in arrays.items()}
            for what, arrays in self._arrays.items()
        }
        return {**values, RAN: ran}

    def gradients(self, found: Sequence[Tagged]) -> dict[str, Arrays]:
        """The gradients in a program that runs the calls and goes back; zero where none arrive.

        Where none arrive in a branch, it is left open whether the branch was taken, and there is no
        gradient.
        """
        # The last call is the first that a gradient reaches.
        backward = [each for each in reversed(found) if each.backward]
        ranks = {name: list(numbers) for name, numbers in _numbers(_runs(found)).items()}
        values: dict[tuple[str, str], Any] = {}
        ran: Arrays = {}
        unknown: set[str] = set()
        for name, numbers in _numbers(_runs(backward)).items():
            known = list(self._numbers.get(name, {}).values())
            for number, runs in numbers.items():
                rank = ranks[name].index(number)
                if len(known) != len(ranks[name]) or len(known[rank]) != len(runs):
                    # JAX has left out calls whose results nothing depends on.
                    unknown.add(name)
                    break
                for partner, run in zip(known[rank], runs, strict=True):
                    for (part, leaf), place in run.arrays.items():
                        values[PARTS[part], partner.key(leaf)] = backward[place].value
                        if run.in_branch:
                            ran[partner.all_steps] = backward[place].ran
        gradients = {
            what: {
                key: values.get((what, key), jnp.zeros(array.aval.shape, array.aval.dtype))
                for key, array in self._arrays[what].items()
                if jnp.issubdtype(array.aval.dtype, jnp.inexact)
                and array.run.tag.name not in unknown
                and ((what, key) in values or not array.run.in_branch)
            }
            for what in (PARTS["output"], PARTS["input"])
        }
        return {**gradients, RAN: ran}

    def split(self, what: str, arrays: Mapping[str, Any], ran: Mapping[str, Any]) -> Arrays:
        """The arrays of single steps, for arrays of all steps; what is no array stays as it is.

        Args:
          what: What is recorded, such as "layer input".
          arrays: The arrays, or anything else that belongs to them.
          ran: Which of the calls in branches ran, where that is known. The others are left out.
        """
        result: Arrays = {}
        for key, x in arrays.items():
            run, leaf, *_ = self._arrays[what][key]
            went = ran.get(run.all_steps)
            for step, take in _steps(run.stack):
                if hasattr(went, "dtype") and not np.all(take(went)):
                    continue
                result[f"{run.name}{step} [{leaf}]" if leaf else f"{run.name}{step}"] = take(x)
        return result


def _runs(found: Sequence[Tagged]) -> list[_Run]:
    """The calls in a program. One that JAX has traced once and runs twice is two."""
    latest: dict[int, _Run] = {}
    runs: list[_Run] = []
    for i, each in enumerate(found):
        run, key = latest.get(each.tag.number), (each.tag.part, each.tag.leaf)
        if run is None or key in run.arrays:
            run = _Run(each.tag, each.stack, each.place, each.place, each.ran is not None)
            latest[each.tag.number] = run
            runs.append(run)
        run.arrays[key], run.end = i, each.place
    return runs


def _numbers(runs: Sequence[_Run]) -> dict[str, dict[int, list[_Run]]]:
    """Calls by what they are calls of, and by their numbers in ascending order."""
    found: dict[str, dict[int, list[_Run]]] = {}
    for run in runs:
        found.setdefault(run.tag.name, {}).setdefault(run.tag.number, []).append(run)
    return {name: dict(sorted(numbers.items())) for name, numbers in found.items()}


def _in_order(runs: Sequence[_Run]) -> Iterator[tuple[str, Call]]:
    steps = []
    for run in runs:
        for i, (step, _) in enumerate(_steps(run.stack)):
            index = tuple(map(int, np.unravel_index(i, run.stack))) if run.stack else ()
            moments = _moment(run.begin, index), _moment(run.end, index)
            steps.append((f"{run.name}{step}", run.tag.module, *moments))
    begins, ends = sorted(step[2] for step in steps), sorted(step[3] for step in steps)
    for name, module, begin, _ in sorted(steps, key=lambda step: step[3]):
        begun, ended = bisect.bisect(begins, begin), bisect.bisect_left(ends, begin)
        yield name, Call(module, begun, ended)


def _moment(place: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
    """What sorts by time: the place in the program, and at each loop the step of it."""
    both = itertools.zip_longest(place, index)
    return tuple(i for pair in both for i in pair if i is not None)


def _steps(stack: tuple[int, ...]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The names of steps, and what takes them out of arrays of all."""
    if not stack:
        yield "", lambda x: x
        return
    size = math.prod(stack)

    def take(where: Any, x: Any) -> Any:
        if not hasattr(x, "dtype"):
            return x
        keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        flat = x if keys else np.asarray(x)
        return flat.reshape(size, *x.shape[len(stack) :])[where]

    for i in range(min(size, _STEPS)):
        yield f" (step {_number(i, stack)})", functools.partial(take, i)
    if size > _STEPS:
        number = _number(_STEPS, stack)
        yield f" (steps from {number} on)", functools.partial(take, slice(_STEPS, None))


def _number(i: int, stack: tuple[int, ...]) -> str:
    return ".".join(str(n + 1) for n in np.unravel_index(i, stack))
