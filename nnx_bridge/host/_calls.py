"""A call of a hosted model, or of one of its nodes: Linen's program on the variables of the tree.

A node is called as its module would be called inside the model: at its own path, with the model's
keys, and with the modules that it was given. What a call changes is written only when it has ended.
"""

from __future__ import annotations

import contextlib
from typing import Any

from flax import nnx

from nnx_bridge.host._asked import Call, Prepared, as_function, in_mode, own_modes
from nnx_bridge.host._below import Below
from nnx_bridge.host._checks import explain
from nnx_bridge.host._frame import Frame
from nnx_bridge.host._interventions import intervening, marked
from nnx_bridge.host._keys import Keys, drawn
from nnx_bridge.host._program import Place, Program
from nnx_bridge.host._replacement import no_replaced_module, replaced_module
from nnx_bridge.host._tree import Level, slots


def prepare(top: Level, node: Level, asked: Call, around: contextlib.ExitStack) -> Prepared:
    """Prepares a call of a node.

    Args:
      top: the highest node from which ``node`` is known to be reached.
      node: the node.
      asked: the call.
      around: what is entered here lasts until the call has ended.
    """
    place: Place = slots(node)["_linen"]
    if asked.method is not None:
        asked.method = as_function(asked.method)
    outer = replaced_module()
    if outer is not None:
        around.enter_context(no_replaced_module())
    if asked.rngs is None:
        asked.rngs = slots(top).get("_linen_rngs")
    streams = asked.rngs
    keys = around.enter_context(drawn(streams)) if isinstance(streams, nnx.Rngs) else streams
    if not place.path and (outer is None or keys is not None):
        return _OfModel(node, place.program, asked, keys, around)
    return Below(top, node, asked, keys, outer, around)


class _OfModel(Prepared):
    """A call of the whole model, by Linen's `apply`."""

    def __init__(
        self,
        root: Level,
        program: Program,
        asked: Call,
        keys: Keys | None,
        around: contextlib.ExitStack,
    ) -> None:
        self.asked = asked
        self._frame = frame = Frame(root, (), program)
        self._module = module = in_mode(program.module, root, asked)
        self._changeable = program.mutable_collections(asked.mutable, frame.variables)
        self._mutable = frame.mutable(self._changeable)
        marks = intervening(program, [frame], own_modes(root, [frame], asked), around)
        self.run = module.apply
        variables = {**frame.variables, **frame.places} if marks else frame.variables
        self.args = (variables, *asked.args)
        method = marked(asked.method, marks)
        self.kwargs = {"rngs": keys, "method": method, "mutable": self._mutable, **asked.kwargs}

    def keep(self, result: Any) -> Any:
        """See `Prepared`."""
        if self._mutable is False:
            return result
        output, updates = result
        self._frame.keep(updates, self._changeable)
        return output

    def explain(self, error: Exception) -> None:
        """See `Prepared`; names the module, and variables that do not fit."""
        asked, frame = self.asked, self._frame
        given = (frame.variables, asked.args, asked.kwargs, asked.method)
        explain(error, self._module, *given, frozenset(frame.replacements))
        super().explain(error)
