"""Names in paths, as Linen and NNX write them, brought to one form.

`layers_0` of Linen is `layers/0` in NNX, `if` is `if_`, and `layer_instance/kernel/u` is one key
with slashes. A path becomes `Token`s: names without case and numbers, each with the numbers behind
it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from nnx_bridge._collections import Path

_NUMBERED = re.compile(r"(.*?)((?:_?\d+)*)_*", re.DOTALL)


class Token(NamedTuple):
    """A name, without numbers and underscores at its end, and the numbers.

    Attributes:
      name: In lower case.
      numbers: Those behind it, such as the 3 of `layers_3` or of `layers/3`.
      end: How many parts of the path it and those before it are made of.
    """

    name: str
    numbers: tuple[int, ...]
    end: int


def parts(path: Path) -> Iterator[tuple[str | int, int]]:
    """The names and numbers in a path, with tuples and slashes inside of keys taken apart, and how
    many keys they belong to."""
    for end, key in enumerate(path, start=1):
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, int):
                yield part, end
            else:
                yield from ((piece, end) for piece in str(part).split("/") if piece)


@functools.lru_cache(maxsize=1 << 16)
def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """A name without the numbers at its end, and these.

    Example:
        >>> split_name("Dense_12"), split_name("fc1"), split_name("if_")
        (('dense', (12,)), ('fc', (1,)), ('if', ()))
    """
    match = _NUMBERED.fullmatch(name)
    assert match is not None  # It matches every string.
    return match[1].lower(), tuple(int(n) for n in re.findall(r"\d+", match[2]))


@functools.lru_cache(maxsize=1 << 16)
def tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a path.

    Example:
        >>> [(t.name, t.numbers) for t in tokens(("layers", 0, "if_"))]
        [('layers', (0,)), ('if', ())]
    """
    found: list[Token] = []
    for part, end in parts(path):
        name, numbers = ("", (part,)) if isinstance(part, int) else split_name(part)
        if not name and numbers and found:
            last = found[-1]
            found[-1] = Token(last.name, (*last.numbers, *numbers), end)
        else:
            found.append(Token(name, numbers, end))
    return tuple(found)


@functools.lru_cache(maxsize=1 << 16)
def canonical(path: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What paths have in common that differ in how a name is written only.

    Example:
        >>> canonical(("layers_0", "kernel")) == canonical(("layers", 0, "kernel"))
        True
    """
    return tuple((token.name, token.numbers) for token in tokens(path))


@functools.lru_cache(maxsize=1 << 16)
def number_keys(path: Path) -> tuple[tuple[int, ...], ...]:
    """For each number of each token, the place of the key in the path that it is in.

    Example:
        >>> number_keys(("layers", 0, "up_1", "kernel"))
        ((1,), (2,), ())
    """
    found = [
        (end - 1, ("", (part,)) if isinstance(part, int) else split_name(part))
        for part, end in parts(path)
    ]
    keys = iter(key for key, (_, numbers) in found for _ in numbers)
    return tuple(tuple(next(keys) for _ in token.numbers) for token in tokens(path))


def leaf_name(key: Any) -> str:
    """The name of a variable without what it is written with.

    Example:
        >>> leaf_name("layer_instance/kernel/scale"), leaf_name(("kernel", "u"))
        ('scale', 'u')
    """
    last = [part for part, _ in parts((key,))][-1]
    return split_name(last)[0] if isinstance(last, str) else str(last)
