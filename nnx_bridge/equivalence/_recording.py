"""The calls of modules in one run of a model, on either side.

Linen modules are seen through `nn.intercept_methods`, NNX modules through a class of their own that
they have during the run. What they get and give is tagged (`_tags.py`), wherever they are called:
the layers inside of a scanned, mapped or rematerialised block like others. `_calls.py` makes names
and steps of what is found.

The keys that modules draw are counted the same way on both sides: the n-th draw of a run gets the
run's key folded with n, whoever asks and by which name. So a rewrite that draws where its
original drew gets the same masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from nnx_bridge import _flax_private, _linen_private
from nnx_bridge._values import map_with_path
from nnx_bridge.captures._method_outputs import intercepting, is_method, uncompiled
from nnx_bridge.equivalence._arrays import Arrays
from nnx_bridge.equivalence._tags import tagged
from nnx_bridge.host import Host, Node
from nnx_bridge.host._marks import traced_anew

# The attribute by which a copy that a transform makes of a module knows where it comes from.
_WHERE = "where_it_is_compared"


@dataclasses.dataclass(frozen=True)
class Tag:
    """One array that a module gets or gives.

    Attributes:
      number: The number of the call, in the order in which the calls began.
      name: The path of the module, with the method where it is another than `__call__`; or the
        path of a sown value.
      module: The class of the module.
      part: "input", "output" or "sown".
      leaf: Which array it is, where there are several.
      inside: The number of the call of the same method and module that is around this one.
    """

    number: int
    name: str
    module: str
    part: str
    leaf: str = ""
    inside: int | None = None


class Recorder:
    """Tags what the modules of one run get and give.

    Attributes:
      failed: The innermost module that an exception passed through.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self._open: dict[str, int] = {}
        self._numbers = itertools.count()
        self._hosts: list[str] = []

    def call(
        self, path: str, cls: str, method: str, fn: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls a method and tags its arguments and its result."""
        name = path if method == "__call__" else f"{path}.{method}"
        around = self._open.get(name)
        tag = Tag(next(self._numbers), name, cls, "input", inside=around)
        self._open[name] = tag.number
        try:
            args, kwargs = _all_tagged((args, kwargs), tag)
            return _all_tagged(fn(*args, **kwargs), dataclasses.replace(tag, part="output"))
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            if around is None:
                del self._open[name]
            else:
                self._open[name] = around

    def sown(self, path: str, cls: str, name: str, value: Any) -> None:
        """Tags the value that a module sows."""
        where = f"{path}/{name}".strip("/")
        _all_tagged(value, Tag(next(self._numbers), where, cls, "sown"))

    @contextlib.contextmanager
    def watching(self, model: nnx.Module | None = None) -> Iterator[None]:
        """Records the calls of Linen modules and of those of `model`, which is a copy to use up."""
        modules: list[nnx.Module] = []
        for path, module in nnx.iter_modules(model, graph=True) if model is not None else ():
            if isinstance(module, Node) and not isinstance(module, Host):
                continue
            setattr(module, _WHERE, _Where("/".join(map(str, path))))
            modules.append(module)
        token = _RECORDER.set(self)
        try:
            with (
                nn.intercept_methods(_linen_call),
                _linen_private.sows_told_to(_linen_sow),
                traced_anew(),
                intercepting(modules, is_method, _nnx_call, also=("sow",)),
            ):
                yield
        finally:
            _RECORDER.reset(token)

    def linen(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Records the call of a Linen module."""
        if context.method_name == "setup" or not is_method(context.module, context.method_name):
            return call(*args, **kwargs)
        cls = type(context.module).__name__
        path = self.path_of(context.module)
        return self.call(path, cls, context.method_name, call, args, kwargs)

    def path_of(self, module: nn.Module) -> str:
        """The path of a Linen module, below the host that runs it."""
        inner = () if module.scope is None else module.path
        return "/".join([*self._hosts[-1:], *inner]).strip("/")

    def native(self, module: nnx.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """Records the call of an NNX module."""
        where = getattr(module, _WHERE, None)
        if where is None:
            # It was made during the call.
            return call(*args, **kwargs)
        call = uncompiled(call)
        if not isinstance(module, Host):
            return self.call(where.path, type(module).__name__, name, call, args, kwargs)
        # Of a host the calls of its Linen modules count.
        self._hosts.append(where.path)
        try:
            return call(*args, **kwargs)
        finally:
            self._hosts.pop()


class _Where:
    """The path of a module; equal to any other, so that equal modules stay equal.

    Models stack the states of equal layers, and need for it that they are of one structure.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Where)

    def __hash__(self) -> int:
        return hash(_Where)


_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def _linen_call(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    recorder = _RECORDER.get()
    return (
        call(*args, **kwargs) if recorder is None else recorder.linen(call, args, kwargs, context)
    )


def _linen_sow(module: nn.Module, name: str, value: Any) -> None:
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.sown(recorder.path_of(module), type(module).__name__, name, value)


def _nnx_call(module: nnx.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    recorder = _RECORDER.get()
    if recorder is None:
        return call(*args, **kwargs)
    if name != "sow":
        return recorder.native(module, name, call, args, kwargs)
    given = inspect.signature(nnx.Module.sow).bind(module, *args, **kwargs).arguments
    where = getattr(module, _WHERE, None)
    if where is not None:
        recorder.sown(where.path, type(module).__name__, given["name"], given["value"])
    # Where nobody listens, `sow` of NNX warns, and keeps the value in the module.
    return False if _flax_private.captured(module) is None else call(*args, **kwargs)


def _all_tagged(tree: Any, tag: Tag) -> Any:
    def with_tag(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        return tagged(leaf, dataclasses.replace(tag, leaf=where))

    # Modules and streams among the arguments are written by the call: they stay themselves.
    return map_with_path(with_tag, tree, _is_object)


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


class _Draws:
    """The keys of one run."""

    def __init__(self, key: jax.Array) -> None:
        self._key, self._count = key, 0

    def __call__(self) -> jax.Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


_DRAWS: ContextVar[_Draws | None] = ContextVar("draws", default=None)


@contextlib.contextmanager
def drawing(key: jax.Array, streams: Sequence[nnx.RngStream] = ()) -> Iterator[None]:
    """Gives out keys by the order in which they are asked for.

    Linen modules of this thread, and `streams`, get them until the context ends.
    """
    draws = _Draws(key)
    classes = [type(stream) for stream in streams]
    with _linen_private.keys_from(draws):
        token = _DRAWS.set(draws)
        try:
            for stream in streams:
                object.__setattr__(stream, "__class__", _CountedStream)
            yield
        finally:
            _DRAWS.reset(token)
            for stream, cls in zip(streams, classes, strict=True):
                object.__setattr__(stream, "__class__", cls)


class _CountedStream(nnx.RngStream):
    """A stream whose keys are those of the run."""

    def __call__(self) -> jax.Array:
        draws = _DRAWS.get()
        return super().__call__() if draws is None or self.key.shape else draws()


def streams(model: nnx.Module) -> list[nnx.RngStream]:
    """The RNG streams that a model holds."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]


def named(arrays: Mapping[str, Any], names: Mapping[str, str]) -> Arrays:
    """Recorded arrays under other names of their calls; without those that have none."""
    found = {}
    for key, value in arrays.items():
        call, bracket, leaf = key.partition(" [")
        if call in names:
            found[f"{names[call]}{bracket}{leaf}"] = value
    return found
