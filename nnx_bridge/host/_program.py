"""What is static in a host: the Linen module, how it is called, and what is known of its modules.

Equal programs need one compilation only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core.scope import CollectionFilter

from nnx_bridge._collections import Path, Variables
from nnx_bridge.host._layout import Layout

# What a call with the default filter leaves alone: what optimizers and users change, and what is
# recorded only on request.
_NOT_STATISTICS = ("params", "perturbations", "intermediates")


class Program:
    """A Linen module and how a host calls it.

    Attributes:
      module: the module.
      mutable: the filter of collections that calls may change, or None.
      training: names and values that say training mode, or None.
      layout: what is known of the submodules. It follows from the module, so it does not count in
        comparisons.
    """

    def __init__(
        self,
        module: nn.Module,
        mutable: CollectionFilter | None = None,
        training: Mapping[str, bool] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.module = module
        self.mutable = mutable
        self.training = training
        self.layout = Layout() if layout is None else layout
        try:
            self._hash = hash(module)
        except TypeError:
            # A module that cannot be hashed (it may hold arrays) cannot be compared safely either.
            self._hash = id(module)

    def mutable_collections(
        self, override: CollectionFilter | None, variables: Variables
    ) -> CollectionFilter:
        """The filter for a call: that of the call, of the host, or the default."""
        chosen = self.mutable if override is None else override
        return default_mutable(variables) if chosen is None else chosen

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Program) or self._hash != other._hash:
            return NotImplemented if not isinstance(other, Program) else False
        same = self.module is other.module or self.module == other.module
        return same and (self.mutable, self.training) == (other.mutable, other.training)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return type(self.module).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # Nothing in it is ever written, but what is known of it grows.

    def __getstate__(self) -> dict[str, Any]:
        # Linen's own layers hold functions that cannot be pickled; calls find them again.
        return {name: value for name, value in vars(self).items() if name != "layout"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, layout=Layout.of_setup(state["module"], {}))


@dataclasses.dataclass(frozen=True)
class Place:
    """Which module of which program a node stands for."""

    program: Program
    path: Path

    @property
    def kind(self) -> type[nn.Module] | None:
        """The class of the Linen module, as far as it is known."""
        if not self.path:
            return type(self.program.module)
        known = self.program.layout.submodules.get(self.path)
        return None if known is None else known.kind

    @property
    def module(self) -> nn.Module | None:
        """The Linen module, not bound; None where it is not known, or does not outlive a call."""
        if not self.path:
            return self.program.module
        known = self.program.layout.submodules.get(self.path)
        return None if known is None else known.module

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the Linen module, as far as they are known."""
        if self.path:
            known = self.program.layout.submodules.get(self.path)
            return {} if known is None else known.fields
        module = self.program.module
        names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
        return {name: getattr(module, name) for name in names}


def default_mutable(variables: Variables) -> CollectionFilter:
    """The collections that a call of a host may change where nobody said which."""
    return [name for name in variables if name not in _NOT_STATISTICS] or False
