"""`remat`, which is `checkpoint`, and `remat_scan`: less memory for backward passes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from nnx_bridge.transforms._scan import scanned, scanned_init
from nnx_bridge.transforms._targets import check_output, functionalized, lift_target, with_targets

_ALL_ALONG_0: Mapping[Any, Any] = {True: 0}
_ALL_SPLIT: Mapping[Any, bool] = {True: True}


def checkpoint(
    target: Any,
    variables: Any = True,
    rngs: Any = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    methods: Any = None,
) -> Any:
    """`flax.linen.checkpoint` on NNX: computes again in the backward pass what it would keep.

    Args:
      target: a class of NNX modules, or a function of a module; may be written over a method.
      variables: filter of the collections that are visible inside.
      rngs: filter of the RNG streams that are visible inside.
      concrete: as in Linen, only False.
      prevent_cse: as for `jax.checkpoint`.
      static_argnums: of arguments that are no arrays; 0 is the module.
      policy: what is kept nevertheless, see `jax.checkpoint_policies`.
      methods: the methods of a class to lift, by default ``__call__``.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither.
      NotImplementedError: ``concrete`` is True.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> dense = nn.remat(nnx.Linear)(3, 2, rngs=nnx.Rngs(0))
      >>> dense(jnp.ones((4, 3))).shape, type(dense).__name__
      ((4, 2), 'CheckpointLinear')

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    if concrete:
        raise NotImplementedError(
            "checkpoint: concrete=True is no longer supported by JAX; name the arguments that are "
            "not arrays in static_argnums."
        )
    options = {
        "variables": variables,
        "rngs": rngs,
        "prevent_cse": prevent_cse,
        "static_argnums": static_argnums,
        "policy": policy,
    }
    return lift_target("checkpoint", target, _checkpointed, options, methods)


remat = checkpoint


def _checkpointed(
    fn: Callable[..., Any],
    variables: Any = True,
    rngs: Any = True,
    concrete: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    @functools.wraps(fn)
    def checkpointed(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        inner, mdl, (args, kwargs) = with_targets(fn, mdl, (args, kwargs))
        functional = functionalized("checkpoint", mdl, variables=variables, rngs=rngs)

        def pure(variables: Any, *args: Any, **kwargs: Any) -> Any:
            with functional.opened(variables) as (mdl, written):
                y = inner(mdl, *args, **kwargs)
                updates = written()
            check_output("checkpoint", y)
            return y, updates

        y, updates = jax.checkpoint(pure, **options)(functional.variables, *args, **kwargs)
        functional.publish(updates)
        return y

    return checkpointed


def remat_scan(
    target: Any,
    lengths: Sequence[int] = (),
    policy: Callable[..., bool] | None = None,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    variable_axes: Mapping[Any, Any] = _ALL_ALONG_0,
    split_rngs: Mapping[Any, bool] = _ALL_SPLIT,
) -> Any:
    """`flax.linen.remat_scan` on NNX: repeats a module in nested loops, each step of the outer ones
    computed again in the backward pass.

    The function has the signature ``(mdl, carry) -> carry``.

    Args:
      target: a class of NNX modules, or a function of a module.
      lengths: number of steps of each loop, the outermost first. Memory grows with their sum, the
        number of steps is their product.
      policy: see `checkpoint`.
      variable_broadcast: see `scan`.
      variable_carry: see `scan`.
      variable_axes: see `scan`; each loop adds one axis.
      split_rngs: see `scan`.

    Returns:
      A class or a function, as ``target`` is.

    Raises:
      TypeError: the target is neither.
      ValueError: ``lengths`` is empty, or see `scan`.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> stack = nn.remat_scan(nnx.Linear, lengths=(2, 5))(3, 3, rngs=nnx.Rngs(0))
      >>> stack.kernel.shape, stack(jnp.ones((4, 3))).shape
      ((2, 5, 3, 3), (4, 3))

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    if isinstance(lengths, int) or not lengths or min(lengths) < 0:
        raise ValueError(
            "remat_scan: lengths: expected the length of each loop, such as (3, 4) for 12 steps, "
            f"got {lengths!r}."
        )
    options = {
        "lengths": tuple(lengths),
        "policy": policy,
        "variable_broadcast": variable_broadcast,
        "variable_carry": variable_carry,
        "variable_axes": variable_axes,
        "split_rngs": split_rngs,
    }
    return lift_target("remat_scan", target, _remat_scanned, options, None, _remat_scanned_init)


def _remat_scanned(
    fn: Callable[..., Any], lengths: tuple[int, ...], policy: Any, **options: Any
) -> Callable[..., Any]:
    outer, *inner = lengths
    if inner:
        fn = _remat_scanned(fn, tuple(inner), policy, **options)

    def step(mdl: Any, carry: Any) -> Any:
        return fn(mdl, carry), None

    body = _checkpointed(step, policy=policy, prevent_cse=False) if inner else step
    loop = scanned(body, length=outer, **options)

    @functools.wraps(fn)
    def repeated(mdl: Any, carry: Any) -> Any:
        return loop(mdl, carry)[0]

    return repeated


def _remat_scanned_init(
    fn: Callable[..., Any], lengths: tuple[int, ...], policy: Any, **options: Any
) -> Callable[..., None]:
    for length in reversed(lengths):
        fn = scanned_init(fn, length=length, **options)
    return fn
