"""What a capture context keeps of one module for one Variable type: values by name."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import TraceContextError

from nnx_bridge import _flax_private


@jax.tree_util.register_pytree_with_keys_class
class Records(dict[str, Any]):
    """Values by name, that can be written only in the JAX transform in which they were made.

    An NNX transform makes new ones inside, and brings them back. A JAX transform of a function that
    closes over the module does not: what it wrote would be a tracer that outlives it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._trace_state = _flax_private.trace_state()

    def __setitem__(self, name: str, value: Any) -> None:
        if _flax_private.trace_state() != self._trace_state:
            raise TraceContextError(
                f"{name!r} is recorded inside a JAX transform whose function closes over the "
                "module. Give the module to the transform as an argument: use a transform of "
                "flax.nnx or of lifted in place of that of jax."
            )
        super().__setitem__(name, value)

    def tree_flatten_with_keys(self) -> tuple[list[Any], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(n), dict.__getitem__(self, n)) for n in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Sequence[Any]) -> "Records":
        return cls(zip(names, values, strict=True))


@jax.tree_util.register_pytree_with_keys_class
class Perturbations(Records):
    """Values that are added to others.

    `nnx.Module.perturb` adds one with ``+``. Where it is a pytree, what is taken from here adds
    leaf by leaf.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value if jax.tree_util.all_leaves([value]) else _Addend(value)


class _Addend:
    """A pytree that is added to another one leaf by leaf."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    def __add__(self, other: Any) -> Any:
        return jax.tree.map(jnp.add, self._tree, other)
