"""How alike paths of two sides are, all with all, from the names in them and the numbers.

The tokens of two paths are aligned in their order, and what may be left out is paid for, so that a
level more on one side (`encoder/blocks/0` and `Block_0`) does little harm. A name of NNX also goes
by that of its class (`Dense_0` is probably an `nnx.Linear`). Numbers count by their rank among
their siblings where these are equally many on both sides: `fc1, fc2` and `Dense_0, Dense_1`
correspond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nnx_bridge._collections import Path
from nnx_bridge.weights._paths import canonical, tokens
from nnx_bridge.weights._registry import names_of_class

# Above this number of pairs of names only equal ones count as alike.
_FUZZY = 1_000_000
_ONE_NUMBER = 0.3
_MASK = (1 << 62) - 1  # Of a hash of several numbers, so that it is not negative.

# What people call Flax's variables in layers of their own.
_SYNONYMS = {
    "gamma": "scale",
    "beta": "bias",
    "b": "bias",
    "weight": "kernel",
    "weights": "kernel",
    "w": "kernel",
}
# Names that Flax's layers give to their variables: they never stand for each other.
_STANDARD = frozenset(("kernel", "bias", "scale", "embedding", "mean", "var"))


class Words(NamedTuple):
    """A path for comparison.

    Attributes:
      names: For each token the names that it goes by.
      numbers: For each token its numbers; their place among those of its siblings; and how many of
        these there are. All are -1 for a token without numbers.
    """

    names: tuple[tuple[str, ...], ...]
    numbers: tuple[tuple[int, int, int], ...]


def words(paths: Sequence[Path], classes: Mapping[Path, type], *, leaf: bool) -> list[Words]:
    """The words of paths.

    Args:
      paths: Those of one side that are compared with those of another.
      classes: The classes of the modules that they lead through.
      leaf: Whether the last token counts too, the name of the array.
    """
    ends = None if leaf else -1
    taken = [tokens(path)[:ends] for path in paths]
    names = [canonical(path)[:ends] for path in paths]
    siblings: dict[object, set[tuple[int, ...]]] = {}
    for name in names:
        for i, (stem, numbers) in enumerate(name):
            if numbers:
                siblings.setdefault((name[:i], stem), set()).add(numbers)
    ranks = {k: {n: r for r, n in enumerate(sorted(v))} for k, v in siblings.items()}

    def number(name: Any, i: int) -> tuple[int, int, int]:
        stem, numbers = name[i]
        if not numbers:
            return (-1, -1, -1)
        among = ranks[name[:i], stem]
        return (hash(numbers) & _MASK, among[numbers], len(among))

    result = []
    for path, found, name in zip(paths, taken, names, strict=True):
        known = [classes.get(path[: token.end]) for token in found]
        aliases = [
            (t.name, *(names_of_class(c) if c else ())) for t, c in zip(found, known, strict=True)
        ]
        result.append(Words(tuple(aliases), tuple(number(name, i) for i in range(len(name)))))
    return result


def similarities(
    ours: Sequence[Words], theirs: Sequence[Words], numbers: float = 0.5
) -> np.ndarray:
    """How alike each of `ours` is to each of `theirs`, from 0 to 1.

    `numbers` is what they count of tokens that have some, the rest being that of their names.
    """
    our_names = {name: i for i, name in enumerate({n: 0 for w in ours for n in w.names})}
    their_names = {name: i for i, name in enumerate({n: 0 for w in theirs for n in w.names})}
    table = np.zeros((len(our_names) + 1, len(their_names) + 1), np.float32)
    fuzzy = len(our_names) * len(their_names) <= _FUZZY
    by_name: dict[str, list[int]] = {}
    for name, j in their_names.items():
        for alias in name:
            by_name.setdefault(alias, []).append(j)
    for name, i in our_names.items():
        for other, j in their_names.items() if fuzzy else ():
            table[i, j] = max(alike(a, b) for a in name for b in other)
        for alias in name:
            table[i, by_name.get(alias, [])] = 1
    our_ids, our_numbers = _padded(ours, our_names)
    their_ids, their_numbers = _padded(theirs, their_names)
    # best[j]: the best alignment of the first i tokens of ours with the first j of theirs.
    shape = (len(ours), len(theirs))
    best = [np.zeros(shape, np.float32) for _ in range(their_ids.shape[1] + 1)]
    for i in range(our_ids.shape[1]):
        row = [np.zeros(shape, np.float32)]
        for j in range(their_ids.shape[1]):
            names = table[np.ix_(our_ids[:, i], their_ids[:, j])]
            step = _with_numbers(names, our_numbers[:, i, None], their_numbers[None, :, j], numbers)
            row.append(np.maximum(np.maximum(step + best[j], best[j + 1]), row[-1]))
        best = row
    lengths = np.add.outer([len(w.names) for w in ours], [len(w.names) for w in theirs])
    shares = np.where(lengths == 0, 1.0, 2 * best[-1] / np.maximum(lengths, 1))
    # What is alike to the same degree must not differ by the rounding of its sum.
    return np.round(shares.astype(np.float64), 4)


def _with_numbers(
    names: np.ndarray, ours: np.ndarray, theirs: np.ndarray, weight: float
) -> np.ndarray:
    (number, rank, count), (number_, rank_, count_) = (
        np.moveaxis(x, -1, 0) for x in (ours, theirs)
    )
    both = (count > 0) & (count_ > 0)
    equal = np.where(count == count_, rank == rank_, number == number_)
    # Where only one is numbered, little is known, unless it is the only one of its name.
    one = np.where(np.maximum(count, count_) > 1, _ONE_NUMBER, 1.0)
    with_number = (1 - weight) * names + weight * equal
    return np.where(both, with_number, names * one).astype(np.float32)


def _padded(
    paths: Sequence[Words], ids: Mapping[tuple[str, ...], int]
) -> tuple[np.ndarray, np.ndarray]:
    depth = max((len(w.names) for w in paths), default=0)
    names = np.full((len(paths), depth), len(ids))
    numbers = np.full((len(paths), depth, 3), -1)
    for i, w in enumerate(paths):
        names[i, : len(w.names)] = [ids[name] for name in w.names]
        numbers[i, : len(w.names)] = np.reshape(w.numbers, (-1, 3))
    return names, numbers


def alike(a: str, b: str) -> float:
    """How alike two names are: equal, one an abbreviation of the other, or with words in common."""
    a, b = _SYNONYMS.get(a, a), _SYNONYMS.get(b, b)
    if a == b:
        return 1.0
    if a in _STANDARD and b in _STANDARD:
        return 0.0
    short, long = sorted((a, b), key=len)
    if short and short[0] == long[0] and _within(short, long):
        return 0.6 + 0.35 * len(short) / len(long)
    ours, theirs = a.split("_"), b.split("_")
    if len(ours) == len(theirs) == 1:
        return 0.0
    common = sum(max(alike(x, y) for y in theirs if "_" not in x + y) for x in ours)
    return 0.9 * common / max(len(ours), len(theirs))


def _within(short: str, long: str) -> bool:
    """Whether the letters of `short` occur in `long`, in their order."""
    letters = iter(long)
    return all(letter in letters for letter in short)
