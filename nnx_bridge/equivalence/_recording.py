"""The calls of modules in one run of a model, in the order in which they end, on either side.

Linen modules are seen through `nn.intercept_methods`, NNX modules through a class of their own that
they have during the run. A call inside a transform (a scanned layer) belongs to another trace, from
which nothing can be taken out: there the call around the transform is what is seen.

The keys that modules draw are counted the same way on both sides: the n-th draw of a run gets the
run's key folded with n, whoever asks and by which name. So a rewrite that draws where its
original drew gets the same masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx

from nnx_bridge import _flax_private, _linen_private
from nnx_bridge.captures._method_outputs import intercepting, is_method
from nnx_bridge.host import Host, Node

Arrays = dict[str, Any]


class Call(NamedTuple):
    """One call of a module.

    Attributes:
      module: The class of the module.
      begun: How many calls had begun when it began.
      ended: How many calls had ended by then.
    """

    module: str
    begun: int
    ended: int


class Recorder:
    """What the modules of one run got and gave.

    Args:
      offsets: Values that are added to what modules get and give, by the keys of `inputs` and
        `outputs`; the gradients there are those of the offsets.

    Attributes:
      inputs: The arrays that each call got, by the name of the call.
      outputs: Those that it gave.
      calls: The calls by their names, in the order in which they ended.
      failed: The innermost module that an exception passed through.
    """

    def __init__(self, offsets: tuple[Arrays, Arrays] | None = None) -> None:
        self.inputs: Arrays = {}
        self.outputs: Arrays = {}
        self.calls: dict[str, Call] = {}
        self.failed: str | None = None
        self.offsets = offsets or ({}, {})
        self._open: set[tuple[str, str]] = set()
        self._begun = 0
        self._counts: dict[str, int] = {}
        self._trace = _flax_private.trace_state()
        self._hosts: list[str] = []
        self._paths: dict[int, str] = {}

    def call(
        self, path: str, cls: str, method: str, fn: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls a method and records it, unless it belongs to another trace."""
        if (path, method) in self._open or _flax_private.trace_state() != self._trace:
            return fn(*args, **kwargs)
        name = path if method == "__call__" else f"{path}.{method}"
        self._open.add((path, method))
        try:
            self._begun += 1
            count = self._counts[name] = self._counts.get(name, 0) + 1
            name = name if count == 1 else f"{name} (call {count})"
            begun, ended = self._begun, len(self.calls)
            args, kwargs = self._note(name, (args, kwargs), self.inputs, self.offsets[0])
            y = self._note(name, fn(*args, **kwargs), self.outputs, self.offsets[1])
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            self._open.remove((path, method))
        self.calls[name] = Call(cls, begun, ended)
        return y

    def _note(self, name: str, tree: Any, arrays: Arrays, offsets: Arrays) -> Any:
        def note(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            key = f"{name} [{where}]" if where else name
            leaf = leaf + offsets[key] if key in offsets else leaf
            arrays[key] = leaf
            return leaf

        # Modules and streams among the arguments are written by the call: they stay themselves.
        return jax.tree_util.tree_map_with_path(note, tree, is_leaf=_is_object)

    @contextlib.contextmanager
    def watching(self, model: nnx.Module | None = None) -> Iterator[None]:
        """Records the calls of Linen modules and of those of `model`."""
        modules: list[nnx.Module] = []
        for path, module in nnx.iter_modules(model, graph=True) if model is not None else ():
            if isinstance(module, Node) and not isinstance(module, Host):
                continue
            self._paths[id(module)] = "/".join(map(str, path))
            modules.append(module)
        token = _RECORDER.set(self)
        try:
            with nn.intercept_methods(_linen_call), intercepting(modules, is_method, _nnx_call):
                yield
        finally:
            _RECORDER.reset(token)

    def linen(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Records the call of a Linen module."""
        if context.method_name == "setup" or not is_method(context.module, context.method_name):
            return call(*args, **kwargs)
        inner = () if context.module.scope is None else context.module.path
        path = "/".join([*self._hosts[-1:], *inner]).strip("/")
        cls = type(context.module).__name__
        return self.call(path, cls, context.method_name, call, args, kwargs)

    def native(self, module: nnx.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        """Records the call of an NNX module."""
        path = self._paths.get(id(module))
        if path is None:
            # A copy that a transform has made.
            return call(*args, **kwargs)
        if not isinstance(module, Host):
            return self.call(path, type(module).__name__, name, call, args, kwargs)
        # Of a host the calls of its Linen modules count.
        self._hosts.append(path)
        try:
            return call(*args, **kwargs)
        finally:
            self._hosts.pop()


_RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def _linen_call(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    recorder = _RECORDER.get()
    return (
        call(*args, **kwargs) if recorder is None else recorder.linen(call, args, kwargs, context)
    )


def _nnx_call(module: nnx.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
    recorder = _RECORDER.get()
    if recorder is None:
        return call(*args, **kwargs)
    return recorder.native(module, name, call, args, kwargs)


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
