"""The nodes of a hosted model: NNX modules that show, and run, the Linen modules they stand for."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter

from lifted._errors import path_text, suggestion
from nnx_bridge import _flax_private
from nnx_bridge._names import OWN_ATTRIBUTES, attribute_name
from nnx_bridge.host._asked import Call, method_of
from nnx_bridge.host._assigned import check_replacement, check_value
from nnx_bridge.host._calls import prepare
from nnx_bridge.host._interventions import Method
from nnx_bridge.host._keys import Keys
from nnx_bridge.host._modes import find_mode
from nnx_bridge.host._node_type import NodeType, node_type, sent, sent_type
from nnx_bridge.host._program import Place
from nnx_bridge.host._properties import read_property
from nnx_bridge.host._tree import Level, put, slots

# From which node each node was last reached, so that one which is called by itself finds the keys
# and the modules of the model that it is a part of.
_reached: weakref.WeakKeyDictionary[Level, weakref.ref[Level]] = weakref.WeakKeyDictionary()


class Node(Level, metaclass=NodeType):
    """One level of a hosted model: the variables of one Linen module, and its submodules.

    It is called as its Linen module is, with any method: `model.encoder(x)`,
    `model.encoder.attend(x)`. The fields of the Linen module are its attributes. Where a name of
    Linen is that of an attribute of NNX modules (`train`, `eval`, `sow`, ...), the attribute has
    one more underscore (`model.train_`); `model["train"]` takes Linen's names.

    Assigning an NNX module to the attribute of a submodule replaces it: the model calls the NNX
    module from then on.
    """

    # Of the classes that `node_type` makes: the Linen class, weakly, and the class it derives from.
    _kind: ClassVar[weakref.ref[type[nn.Module]] | None] = None
    _base: ClassVar[Any] = None

    def __call__(
        self,
        *args: Any,
        rngs: Keys | nnx.Rngs | None = None,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the Linen module and keeps what it changed.

        Args:
          *args: Arguments of the Linen method.
          rngs: Keys for this call alone, as for `module.apply`, or `nnx.Rngs` to draw them from; by
            default the streams of the host.
          method: The Linen method, as for `module.apply`.
          mutable: The collections that this call may change; `False` for none. What is sown into
            `intermediates` is that of the last call that was allowed to.
          **kwargs: Further arguments of the Linen method.

        Returns:
          What the Linen method returns. Changed variables are in the model, not in the result.

        Raises:
          ValueError: The module of the node is not known, or needs one that cannot be reached.
        """
        asked = Call(args, kwargs, rngs, method, mutable)
        with contextlib.ExitStack() as around:
            linen = prepare(top_of(self), self, asked, around)
            try:
                result = linen.run(*linen.args, **linen.kwargs)
            except Exception as error:
                linen.explain(error)
                raise
            return linen.keep(result)

    @property
    def deterministic(self) -> bool | None:
        """Whether the node is in evaluation mode; None where neither mode was chosen."""
        return self._evaluates("deterministic")

    @property
    def use_running_average(self) -> bool | None:
        """As `deterministic`."""
        return self._evaluates("use_running_average")

    def _evaluates(self, field: str) -> bool | None:
        training = slots(self).get("_linen_mode")
        return slots(self)["_linen"].fields.get(field) if training is None else not training

    @property
    def training_arguments(self) -> dict[str, bool]:
        """The argument of `__call__` or the field that `train()` and `eval()` set, with its value
        in training; empty where the module has none.

        Raises:
          ValueError: There are several, and none was chosen.
        """
        place: Place = slots(self)["_linen"]
        module = place.module
        if module is None:
            return {}
        mode = find_mode(module, method_of(module, None), place.program.training)
        return {**mode.arguments, **mode.fields}

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> None:
        """Sets the mode, for `nnx.view`."""
        for value in (deterministic, use_running_average):
            if value is not None:
                put(self, "_linen_mode", not value)

    def _new_level(self, name: str) -> Node:
        place: Place = slots(self)["_linen"]
        return make(Node, Place(place.program, (*place.path, name)))

    def __getitem__(self, name: str) -> Any:
        """The variable, submodule or field of this name in Linen."""
        if attribute_name(name) in slots(self):
            value = slots(self)[attribute_name(name)]
            return getattr(self, attribute_name(name)) if isinstance(value, Node) else value
        fields = slots(self)["_linen"].fields
        if name in fields:
            return fields[name]
        raise KeyError(f"{type(self).__name__} has no {name!r}; {suggestion(name, _names(self))}")

    def __setitem__(self, name: str, value: Any) -> None:
        self.__setattr__(attribute_name(name), value)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"{type(self).__name__}, a node of a hosted model, cannot be iterated over")

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if Level in type(value).__mro__:  # `isinstance` takes longer.
            _reached[value] = weakref.ref(self)
        return value

    def __getattr__(self, name: str) -> Any:
        # Only for what is neither a variable, a submodule nor an attribute of nnx.Module.
        place = None if name.startswith("__") else slots(self).get("_linen")
        if place is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}", name=name, obj=self)
        if name in place.fields:
            return place.fields[name]
        kind = place.kind
        found = inspect.getattr_static(kind, name, _MISSING)
        if isinstance(found, staticmethod | classmethod | type):
            return getattr(kind, name)
        if callable(found):
            return functools.partial(self, method=found)
        if found is not _MISSING:
            return read_property(top_of(self), self, name)
        what = "Linen module" if kind is None else kind.__name__
        raise AttributeError(
            f"the hosted {what} has no variable, submodule, field or method {name!r}; "
            f"{suggestion(name, _names(self))}",
            name=name,
            obj=self,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        place: Place | None = slots(self).get("_linen")
        if name in ("deterministic", "use_running_average"):
            put(self, "_linen_mode", None if value is None else not value)
        elif place is None or name in OWN_ATTRIBUTES or name.startswith("__"):
            put(self, name, value)
        elif isinstance(value, nnx.Module):
            check_replacement(self, name, value)
            put(self, name, value)
        elif name in place.fields and not isinstance(value, nnx.Variable):
            raise AttributeError(
                f"{name!r} is a field of the Linen module {path_text(place.path) or 'itself'}, "
                "which is fixed: host a module that is made with another value"
            )
        else:
            check_value(self, name, value)
            put(self, name, value)

    def __reduce__(self) -> Any:
        # By the Linen class also where classes are pickled as a whole, as cloudpickle does.
        kind = self._kind and self._kind()
        return _empty, (kind and sent(kind), self._base or type(self)), self.__getstate__()

    def __nnx_repr__(self) -> Iterator[Any]:
        shown = super().__nnx_repr__()
        next(shown)
        yield _flax_private.shown_class(_shown_type(self))
        for name, value in _shown_fields(self).items():
            yield _flax_private.shown_attribute(name, value)
        yield from shown

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        # NNX shows the attributes that are there, so the fields are put there for one that is shown
        # in place of the node.
        shown = object.__new__(_shown_type(self))
        vars(shown).update({**_shown_fields(self), **slots(self)})
        return super(Node, shown).__treescope_repr__(path, subtree_renderer)


N = TypeVar("N", bound=Node)
_MISSING = object()


def _empty(kind: Any, base: type[N]) -> N:
    """A node to be filled with what was pickled."""
    made = sent_type(kind, base)
    return object.__new__(made)


def make(base: type[N], place: Place) -> N:
    """A node without anything below it."""
    node = node_type(place.kind, base)()
    put(node, "_linen", place)
    return node


def top_of(node: Level) -> Level:
    """The highest node from which ``node`` was reached and to which it still belongs."""
    while True:
        reference = _reached.get(node)
        parent = None if reference is None else reference()
        if parent is None or not any(value is node for value in slots(parent).values()):
            return node
        own: Place = slots(node)["_linen"]
        place: Place = slots(parent)["_linen"]
        if own.path[:-1] != place.path or own.program != place.program:
            return node
        node = parent


def _shown_type(node: Node) -> type[Node]:
    """The class of a node; where it was not known when the node was made, that known by now."""
    return type(node) if node._kind else node_type(slots(node)["_linen"].kind, type(node))


def _shown_fields(node: Level) -> dict[str, Any]:
    """The fields of the Linen module that are not shown as submodules already."""
    fields = slots(node)["_linen"].fields.items()
    return {name: value for name, value in fields if attribute_name(name) not in slots(node)}


def _names(node: Level) -> list[str]:
    attributes = [n for n, x in slots(node).items() if isinstance(x, nnx.Module | nnx.Variable)]
    return [*dict.fromkeys([*attributes, *slots(node)["_linen"].fields])]
