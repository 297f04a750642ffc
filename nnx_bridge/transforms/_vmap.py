"""`vmap`: one function of a module over many examples or many modules."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from nnx_bridge.transforms._arguments import agreed, axes_of, bind, check_variables, sizes_of
from nnx_bridge.transforms._construct import vmapped_init
from nnx_bridge.transforms._lifting import Lifting
from nnx_bridge.transforms._mapped import Mapped
from nnx_bridge.transforms._plan import Plan, rules_of_axes
from nnx_bridge.transforms._targets import lift_target, with_targets

_NO_OPTIONS: Mapping[Any, Any] = {}


def vmap(
    target: Any,
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
    methods: Any = None,
) -> Any:
    """`flax.linen.vmap` on NNX: maps a module class, or a function of a module, over an axis.

    Args:
      target: a class of NNX modules, or a function of a module and arrays. The module may be a
        pytree of modules; modules among the other arguments are lifted too.
      variable_axes: for each collection the axis along which its Variables have a value for each
        example, or None for one value of all. `In` and `Out` say so for one direction. A
        collection that is not named is not visible inside.
      split_rngs: for each RNG stream whether each example gets another key (the keys are
        `jax.random.split` of the stream's) or all the same. A stream that is not named is not
        visible inside. NNX's stream ``default`` is named ``params``, too.
      in_axes: of the arguments after the module, as for `jax.vmap`.
      out_axes: of the result, as for `jax.vmap`.
      axis_size: where neither an argument nor a Variable has the axis. A class whose Variables get
        an axis needs it, as they are made before any argument is known.
      axis_name: of the axis, for collectives such as `jax.lax.pmean`.
      spmd_axis_name: as for `jax.vmap`.
      metadata_params: ``{nn.PARTITION_NAME: name}``, the name of the axis in sharding metadata.
      methods: the methods of a class to lift, by default ``__call__``; or a dict with options for
        each, which agree on what says how the Variables are made.

    Returns:
      A class or a function, as ``target`` is. The class inherits from ``target``; its instances
      have their Variables in the same places, with the axis.

    Raises:
      TypeError: the target is neither, or options have the wrong type.
      ValueError: sizes disagree, a filter names a collection twice, a collection or a stream that
        is not named is used, or what is written to a broadcast Variable differs from example to
        example.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> Heads = nn.vmap(
      ...     nnx.Linear, in_axes=None, out_axes=1, axis_size=4,
      ...     variable_axes={'params': 0}, split_rngs={'params': True},
      ... )
      >>> heads = Heads(3, 2, rngs=nnx.Rngs(0))
      >>> heads.kernel.shape, heads(jnp.ones((5, 3))).shape
      ((4, 3, 2), (5, 4, 2))

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    options = {
        "variable_axes": variable_axes,
        "split_rngs": split_rngs,
        "in_axes": in_axes,
        "out_axes": out_axes,
        "axis_size": axis_size,
        "axis_name": axis_name,
        "spmd_axis_name": spmd_axis_name,
        "metadata_params": metadata_params,
    }
    return lift_target("vmap", target, _vmapped, options, methods, _vmapped_init)


def _vmapped(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
) -> Callable[..., Any]:
    plan = Plan.make("vmap", rules_of_axes("vmap", variable_axes, none=True), split_rngs)

    @functools.wraps(fn)
    def mapped(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        given = bind(fn, args, kwargs)
        inner, mdl, args = with_targets(fn, mdl, given)
        lifting = Lifting(plan, mdl, metadata_params)
        axes = axes_of("vmap", in_axes, args, nothing=None)
        if args is not given:
            check_variables(plan, in_axes, given, nothing=None)
        size = agreed("vmap", "axis_size", axis_size, [*sizes_of(axes, args), *lifting.sizes()])
        options = {"axis_size": size, "axis_name": axis_name, "spmd_axis_name": spmd_axis_name}
        return Mapped(lifting, inner, args, in_axes, out_axes, options).run()

    return mapped


def _vmapped_init(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
) -> Callable[..., None]:
    plan = Plan.make("vmap", rules_of_axes("vmap", variable_axes, none=True), split_rngs)
    names = {"axis_name": axis_name, "spmd_axis_name": spmd_axis_name}
    return vmapped_init(fn, plan, "axis_size", axis_size, metadata_params, **names)
