"""Which names of a source file stand for names of `flax.linen`, found without running it."""

from __future__ import annotations

import ast
from collections.abc import Set
from types import ModuleType

from flax import linen as nn

_LINEN = "flax.linen"


class Names:
    """The imports of a file, wherever in it they are, and the classes that it defines.

    Attributes:
      module: The path of the file, as far as it is known, as that of a module.
      stars: The modules of which everything is imported.
    """

    def __init__(self, tree: ast.Module, file: str = "") -> None:
        parts = tuple(part for part in file.removesuffix(".py").split("/") if part not in ("", "."))
        packed = parts[-1:] == ("__init__",)
        self.module = parts[:-1] if packed else parts
        package = self.module if packed else self.module[:-1]
        self.stars: list[str] = []
        self._names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # `import flax.linen` binds `flax`, `import flax.linen as nn` the whole.
                    first = alias.name.partition(".")[0]
                    self._names[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                around = package[: len(package) - node.level + 1] if node.level else ()
                owner = ".".join([*around, *filter(None, [node.module])])
                for alias in node.names:
                    if alias.name == "*":
                        self.stars.append(owner)
                    else:
                        self._names[alias.asname or alias.name] = f"{owner}.{alias.name}"
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self._names[node.name] = ".".join([*self.module, node.name])
            elif isinstance(node, ast.Assign) and (dotted := self.dotted(node.value)):
                # Another name for what was imported: `remat = nn_partitioning.remat`.
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self._names[target.id] = dotted

    def dotted(self, node: ast.AST) -> str | None:
        """The full name of an expression such as `nn.LayerNorm`; None for what has none."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def meaning(self, names: Set[str]) -> set[str]:
        """The names in the file for what is called one of `names` where it comes from."""
        return {own for own, full in self._names.items() if full.rpartition(".")[-1] in names}

    def linen(self, node: ast.AST) -> str | None:
        """The name in `flax.linen` that an expression stands for.

        What is imported from a file of Linen (`flax.linen.partitioning.remat`) counts as the public
        name that it has; a file itself has none.
        """
        dotted = self.dotted(node)
        if dotted is None and isinstance(node, ast.Name) and _LINEN in self.stars:
            dotted = f"{_LINEN}.{node.id}" if hasattr(nn, node.id) else None
        if dotted is None or not dotted.startswith(f"{_LINEN}."):
            return None
        file, _, name = dotted.removeprefix(f"{_LINEN}.").rpartition(".")
        if file == "initializers":
            return None  # `nnx.initializers` has the same.
        return None if isinstance(getattr(nn, name, None), ModuleType) else name
