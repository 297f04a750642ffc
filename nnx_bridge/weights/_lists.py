"""Lists of equal layers, and lists of such lists, found by the numbers in paths."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lifted._errors import path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._paths import canonical, number_keys, tokens
from nnx_bridge.weights._slots import Slot

# A number in a path: that of a token, and which of its numbers.
_Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layers:
    """A list of equal layers, or a list of lists.

    Attributes:
      where: The path of the list without its numbers; and the paths of the lists in it.
      counts: The lengths of the list, and of those in it.
      arrays: For each array of a layer, that of all layers, by the indices of the lists.
      places: Which numbers in the paths are the indices.
    """

    where: tuple[str, ...]
    counts: tuple[int, ...]
    arrays: tuple[tuple[Slot, ...], ...]
    places: tuple[_Place, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All arrays."""
        return tuple(slot for slots in self.arrays for slot in slots)

    def path_of(self, slot: Slot) -> Path:
        """The path of an array without its indices."""
        keys = number_keys(slot.path)
        indices = {keys[depth][k] for depth, k in self.places}
        named = ((key, i in indices) for i, key in enumerate(slot.path))
        return tuple(
            _unnumbered(key) if index else key
            for key, index in named
            if not (index and str(key).isdigit())
        )


def lists(slots: Sequence[Slot], depth: int, same: Callable[[Slot], Any]) -> Iterator[Layers]:
    """The lists of equal layers, outer ones first.

    Args:
      slots: All arrays.
      depth: 1 for lists, 2 for lists of lists, and so on.
      same: What arrays of different layers must have in common.
    """
    members: dict[Any, dict[tuple[int, ...], dict[Any, Slot]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for slot in slots:
        found, name = tokens(slot.path), canonical(slot.path)
        places = [(d, k) for d, token in enumerate(found) for k in range(len(token.numbers))]
        for chosen in itertools.combinations(places, depth):
            end, last = chosen[-1]
            index = tuple(found[d].numbers[k] for d, k in chosen)
            before = tuple(
                (stem, tuple(None if (d, k) in chosen else n for k, n in enumerate(numbers)))
                for d, (stem, numbers) in enumerate(name[:end])
            )
            numbers = (None if (end, k) in chosen else found[end].numbers[k] for k in range(last))
            key = (chosen, before, found[end].name, tuple(numbers))
            rest = (slot.collection, found[end].numbers[last + 1 :], name[end + 1 :])
            members[key][index][rest] = slot
    for key in sorted(members, key=lambda key: key[0]):
        layers = members[key]
        indices = sorted(layers)
        counts = tuple(len(set(column)) for column in zip(*indices, strict=True))
        first = {rest: same(slot) for rest, slot in layers[indices[0]].items()}
        alike = all(
            {rest: same(slot) for rest, slot in layer.items()} == first for layer in layers.values()
        )
        # Every inner list has the same indices.
        full = set(itertools.product(*map(set, zip(*indices, strict=True)))) == set(indices)
        if alike and full:
            arrays = tuple(tuple(layers[index][rest] for index in indices) for rest in first)
            yield Layers(_where(arrays[0][0].path, key[0]), counts, arrays, key[0])


def _where(path: Path, places: Sequence[_Place]) -> tuple[str, ...]:
    """What the lists in a path are called: `blocks`, `blocks/*/layers`."""
    found = tokens(path)
    texts: list[str] = []
    for i, (depth, _) in enumerate(places):
        start = found[depth - 1].end if depth else 0
        if i and places[i - 1][0] == depth:
            texts.append(f"{texts[-1]}/*")
            continue
        above = found[places[i - 1][0]].end if i else 0
        below = path_text((*path[above:start], _unnumbered(path[start])))
        texts.append(f"{texts[-1]}/*/{below}" if i else below)
    return tuple(texts)


def _unnumbered(part: Any) -> str:
    return str(part).rstrip("_0123456789")
