"""The private parts of Flax that this package knows of, each with a test that fails on a change."""

from typing import Any

from flax import nnx

# Flax keeps its bookkeeping of a node beside the attributes that the user assigned.
BOOKKEEPING = "_pytree__"


def node_attributes(node: nnx.Pytree) -> dict[str, Any]:
    """The attributes that were assigned to a node, as they are now."""
    return {name: value for name, value in vars(node).items() if not name.startswith(BOOKKEEPING)}
