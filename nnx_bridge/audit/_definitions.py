"""Which class a name in a source file stands for, across the files of a package.

Names are followed through imports, relative ones and those with `*` too, through other names for
the same class and through files that import it to pass it on. Nothing is run.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence

from nnx_bridge.audit._names import Names


@dataclasses.dataclass(frozen=True)
class Source:
    """One file."""

    name: str
    tree: ast.Module
    names: Names

    @staticmethod
    def parse(name: str, text: str) -> Source:
        """Reads a file.

        Raises:
          SyntaxError: It is no Python of this version.
        """
        tree = ast.parse(text, name)
        return Source(name, tree, Names(tree, name))

    def at(self, node: ast.AST) -> str:
        """Where in the file something is."""
        return f"{self.name}:{getattr(node, 'lineno', 1)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A class, and the file in which it is."""

    source: Source
    node: ast.ClassDef

    @property
    def full_name(self) -> str:
        """Its name with that of its file."""
        file = self.source.name.removesuffix(".py").replace("/", ".")
        return f"{file}.{self.node.name}"


class Definitions:
    """The classes of several files."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.all = [
            Definition(source, node)
            for source in sources
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef)
        ]
        self._here = {(id(each.source), each.node.name): each for each in self.all}

    def of(self, node: ast.AST, source: Source) -> Definition | None:
        """The class that an expression in a file stands for; None where it is in none of them."""
        dotted = source.names.dotted(node)
        if dotted is not None:
            return self._find(dotted, set())
        if isinstance(node, ast.Name):
            here = self._here.get((id(source), node.id))
            passed_on = (f"{module}.{node.id}" for module in source.names.stars)
            return here or self._first(passed_on, set())
        if isinstance(node, ast.Attribute) and self.of(node.value, source) is not None:
            return self._here.get((id(source), node.attr))  # A class inside of another.
        return None

    def _find(self, dotted: str, seen: set[str]) -> Definition | None:
        module, _, name = dotted.rpartition(".")
        if not module or dotted in seen:
            return None
        seen.add(dotted)
        for source in self._files(module):
            if found := self._here.get((id(source), name)):
                return found
            passed_on = source.names.dotted(ast.Name(name))
            names = [passed_on] if passed_on else [f"{m}.{name}" for m in source.names.stars]
            if found := self._first(iter(names), seen):
                return found
        return None

    def _first(self, names: Iterator[str], seen: set[str]) -> Definition | None:
        return next((found for name in names if (found := self._find(name, seen))), None)

    def _files(self, module: str) -> Iterator[Source]:
        """The files that a module may be in: of the one or the other only the end may be known."""
        wanted = module.split(".")
        for source in self._sources:
            path = source.names.module
            length = min(len(path), len(wanted))
            if length and list(path[-length:]) == wanted[-length:]:
                yield source
            elif not path and source.name.endswith("__init__.py"):
                yield source
