"""The keys of a call: those it was given, or new ones from the streams of its host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import jax
from flax import nnx
from flax.errors import InvalidRngError, TraceContextError

Keys: TypeAlias = jax.Array | dict[str, jax.Array]


@contextlib.contextmanager
def drawn(rngs: nnx.Rngs) -> Iterator[Keys | None]:
    """The keys of a call; streams that gave keys to a call that fails get back their counts."""
    counts = [(rngs[name].count, rngs[name].count.get_value()) for name in rngs]
    try:
        keys = draw(rngs)
    except TraceContextError:
        # Closed over by a transform of JAX, the streams cannot move: what draws nothing still runs.
        try:
            yield None
        except InvalidRngError as error:
            error.add_note(_CLOSED_OVER)
            raise
        return
    try:
        yield keys
    except BaseException:
        for variable, value in counts:
            variable.set_value(value)
        raise


_CLOSED_OVER = (
    "The model is closed over by a transform of JAX, in which its streams cannot move: make it an "
    "argument of a transform of NNX or of lifted, or pass keys with rngs=."
)


def draw(rngs: nnx.Rngs) -> dict[str, jax.Array]:
    """A key for each stream; the stream `default` serves as Linen's `params`."""
    # Not by `rngs.items()`: `nnx.tabulate` compiles every public method, and it is a generator.
    keys = {name: rngs[name]() for name in rngs}
    if "default" in keys:
        keys.setdefault("params", keys.pop("default"))
    return keys


def named_keys(rngs: Keys | nnx.Rngs | None) -> str:
    """Says for which streams a call had keys."""
    if rngs is None:
        return (
            "The host has no streams: make it with some, Host(..., rngs={'dropout': key}), or pass "
            "keys with rngs=."
        )
    names = list(rngs) if isinstance(rngs, nnx.Rngs | Mapping) else ["params"]
    return f"The call had keys for the streams {', '.join(map(repr, names)) or 'of no name'}."
