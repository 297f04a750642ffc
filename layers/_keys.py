"""Keys: what a caller may pass, and what a layer holds.

A layer holds an `nnx.RngStream` forked from what it was given, so that its counter is its own,
travels with the module's state, and moves once a call.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RngSource: TypeAlias = nnx.Rngs | nnx.RngStream | jax.Array


def check_key(key: Any, name: str = "key") -> jax.Array:
    """Returns a single key as a typed key.

    Raises:
      TypeError: if `key` is not one typed key or one raw `uint32` key.
    """
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return _single(key, name)
        if key.dtype == jnp.uint32 and key.ndim >= 1:
            return _single(jax.random.wrap_key_data(jnp.asarray(key)), name)
        raise TypeError(_message(name, f"an array of dtype {key.dtype}, shape {key.shape}"))
    raise TypeError(_message(name, f"{key!r} of type {type(key).__name__}"))


def _single(key: Any, name: str) -> jax.Array:
    if key.shape != ():
        raise TypeError(
            f"{name} must be a single PRNG key, got an array of keys of shape "
            f"{key.shape}; use jax.vmap or nnx.vmap over the keys."
        )
    return key


def _message(name: str, came: str) -> str:
    return f"{name} must be a PRNG key (jax.random.key(seed), or a raw uint32 key), got {came}."


def fork_stream(rngs: RngSource | None, collection: str) -> Any:
    """The stream that a layer keeps, or an empty data attribute.

    Raises:
      TypeError: if `rngs` is none of the accepted kinds.
      ValueError: if `rngs` has neither the stream `collection` nor a default stream.
    """
    if rngs is None:
        return nnx.data(None)
    if isinstance(rngs, nnx.Rngs):
        return stream_of(rngs, collection).fork()
    if isinstance(rngs, nnx.RngStream):
        return rngs.fork()
    if isinstance(rngs, jax.Array | np.ndarray):
        return nnx.RngStream(check_key(rngs, "rngs"), tag=collection)
    raise TypeError(
        "rngs must be an nnx.Rngs, an nnx.RngStream, a PRNG key or None, "
        f"got {rngs!r} of type {type(rngs).__name__}."
    )


def stream_of(rngs: nnx.Rngs, collection: str) -> nnx.RngStream:
    """The stream named `collection`, or the default stream of `rngs`."""
    try:
        return rngs[collection]
    except (AttributeError, KeyError):
        raise ValueError(
            f"rngs has no stream {collection!r} and no default stream; "
            f"write nnx.Rngs({collection}=seed) or nnx.Rngs(seed)."
        ) from None


def next_key(rngs: RngSource | None, collection: str, owner: str) -> jax.Array:
    """One key from whatever the caller passed or the layer holds.

    Raises:
      ValueError: if there is no source of keys.
      TypeError: if the source is none of the accepted kinds.
    """
    if rngs is None:
        raise ValueError(
            f"{owner} needs a key to draw its mask and has none. Pass one to the call "
            f"(rngs=nnx.Rngs({collection}=seed), an nnx.RngStream or jax.random.key(seed)), give "
            "rngs when the layer is built, or switch the mask off with eval() or "
            "deterministic=True."
        )
    if isinstance(rngs, nnx.Rngs):
        return check_key(stream_of(rngs, collection)(), "rngs")
    if isinstance(rngs, nnx.RngStream):
        return check_key(rngs(), "rngs")
    return check_key(rngs, "rngs")
