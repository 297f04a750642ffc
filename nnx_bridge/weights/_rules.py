"""Rules of the user: which paths of Linen are which paths of NNX.

A rule rewrites the path of an array, or of a module, for all that is in it. Then what is known of
the layers still applies, unless the rule says how the arrays lie.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from lifted._errors import describe, path_text
from nnx_bridge._collections import Path
from nnx_bridge.weights._layouts import Layout

Pattern: TypeAlias = str | re.Pattern[str]
Rewrite: TypeAlias = Callable[[str], str | None]

_WILDCARD = re.compile(r"\*\*|\*|\?")
_GLOBS = {"**": "(.+)", "*": "([^/]*)", "?": "([^/])"}


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Paths of Linen that are known to be certain paths of NNX.

    Paths are written with slashes: `params/encoder/Dense_0/kernel`, where the collection may be
    left out, and `encoder/blocks/0/linear/kernel` in NNX. A path of a module stands for everything
    in it.

    Attributes:
      linen: An exact path; a glob, where `*` is any text without a slash and `**` any text; a
        compiled regular expression, for the whole of a path; or a function that returns the path in
        NNX, or None where the rule does not apply. Several globs stand for several arrays of Linen
        that one of NNX is made of, such as query, key and value; the wildcards of all mean the
        same.
      nnx: The path in NNX. For globs each `*` and `**` takes what those of `linen` have matched, in
        their order; for regular expressions `\1` and so on do. For a function it is left out.
      layout: How the arrays lie; by default, what is known of the layers decides.

    Example:
        >>> rule = Rule("encoder/layer_*/attention", "blocks/*/attn")
        >>> rule.target(("params", "encoder", "layer_3", "attention", "query", "kernel"))
        (('blocks', 3, 'attn'), ('query', 'kernel'))
    """

    linen: Pattern | Rewrite | tuple[str, ...]
    nnx: str | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if callable(self.linen) == (self.nnx is not None):
            raise TypeError(
                "a rule is a pattern of Linen with a path of NNX, or a function alone; got "
                f"{describe(self.linen)} with {self.nnx!r}"
            )
        if isinstance(self.linen, tuple) and self.layout is None:
            raise TypeError(
                f"the rule for {' + '.join(self.linen)} joins several arrays; say how, for example "
                "with layout=Concatenate((size, size, size), axis=-1)"
            )

    def target(self, path: Path) -> tuple[Path, Path] | None:
        """The path in NNX of what the rule matches, and what of the path is below that."""
        if callable(self.linen):
            new = self.linen(path_text(path))
            return None if new is None else (to_path(new), ())
        match = self._match(path)
        if match is None:
            return None
        assert self.nnx is not None
        regex = isinstance(self.linen, re.Pattern)
        new = match.expand(self.nnx) if regex else _filled(self.nnx, match.groups())
        return to_path(new), _below(path, len(match.string) - match.end())

    def siblings(self, path: Path) -> tuple[str, ...] | None:
        """The paths of all Linen arrays that the rule joins, if `path` is the first of them."""
        match = self._match(path)
        if match is None or not isinstance(self.linen, tuple):
            return None
        collection = path_text(path)[: -len(match.string)]
        return tuple(collection + _filled(other, match.groups()) for other in self.linen)

    def _match(self, path: Path) -> re.Match[str] | None:
        if callable(self.linen):
            return None
        first = self.linen[0] if isinstance(self.linen, tuple) else self.linen
        pattern = _glob(first) if isinstance(first, str) else first
        for text in (path_text(path), path_text(path[1:])):
            match = pattern.match(text) if isinstance(first, str) else pattern.fullmatch(text)
            if match is not None:
                return match
        return None


def to_rules(rules: Iterable[Any]) -> list[Rule]:
    """Rules from `Rule` objects, tuples of their fields, and functions.

    Raises:
      TypeError: Something is none of these.
    """
    result = []
    for rule in rules:
        if isinstance(rule, Rule):
            result.append(rule)
        elif isinstance(rule, tuple) and len(rule) in (2, 3):
            result.append(Rule(*rule))
        elif callable(rule):
            result.append(Rule(rule))
        else:
            raise TypeError(
                "a rule is a Rule, a tuple (linen, nnx) or (linen, nnx, layout), or a function "
                f"from a path in Linen to one in NNX; got {rule!r}"
            )
    return result


def to_path(text: str) -> Path:
    """`blocks/0/kernel` as `('blocks', 0, 'kernel')`."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("/") if part)


def _below(path: Path, length: int) -> Path:
    """The end of a path whose text has a certain length, not counting the slash before it."""
    for start in range(len(path) + 1):
        if len(path_text(path[start:])) == max(length - 1, 0):
            return path[start:]
    # The rule ends inside of a key that has slashes itself.
    return to_path(path_text(path)[-length:])


@functools.cache
def _glob(pattern: str) -> re.Pattern[str]:
    """Matches a path, or a module above it."""
    parts, end = [], 0
    for wildcard in _WILDCARD.finditer(pattern):
        parts += [re.escape(pattern[end : wildcard.start()]), _GLOBS[wildcard[0]]]
        end = wildcard.end()
    return re.compile("".join([*parts, re.escape(pattern[end:]), "(?=/|$)"]))


def _filled(pattern: str, texts: Sequence[str]) -> str:
    """A pattern with texts in the places of its wildcards."""
    count = len(_WILDCARD.findall(pattern))
    if count > len(texts):
        raise ValueError(f"{pattern!r} has {count} wildcards, its partner only {len(texts)}")
    remaining = iter(texts)
    return _WILDCARD.sub(lambda _: next(remaining), pattern)
