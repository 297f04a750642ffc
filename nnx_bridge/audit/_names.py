"""Which names of a source file stand for names of `flax.linen`, found without running it."""

from __future__ import annotations

import ast
from types import ModuleType

from flax import linen as nn

_LINEN = "flax.linen"


class Names:
    """The imports of a file, wherever in it they are."""

    def __init__(self, tree: ast.Module) -> None:
        self._names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # `import flax.linen` binds `flax`, `import flax.linen as nn` the whole.
                    first = alias.name.partition(".")[0]
                    self._names[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in tree.body:
            if isinstance(node, ast.Assign) and (dotted := self.dotted(node.value)):
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

    def linen(self, node: ast.AST) -> str | None:
        """The name in `flax.linen` that an expression stands for.

        What is imported from a file of Linen (`flax.linen.partitioning.remat`) counts as the public
        name that it has; a file itself has none.
        """
        dotted = self.dotted(node)
        if dotted is None or not dotted.startswith(f"{_LINEN}."):
            return None
        file, _, name = dotted.removeprefix(f"{_LINEN}.").rpartition(".")
        if file == "initializers":
            return None  # `nnx.initializers` has the same.
        return None if isinstance(getattr(nn, name, None), ModuleType) else name
