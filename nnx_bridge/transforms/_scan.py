"""`scan`: a function of a module in a loop with a fixed number of steps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core import broadcast

from nnx_bridge.transforms._arguments import agreed, axes_of, bind, check_variables, sizes_of
from nnx_bridge.transforms._construct import vmapped_init
from nnx_bridge.transforms._lifting import Lifting
from nnx_bridge.transforms._loop import Loop
from nnx_bridge.transforms._plan import Kept, Plan, Rule, rules_of_axes
from nnx_bridge.transforms._targets import check_carry, lift_target, with_targets

_NO_OPTIONS: Mapping[Any, Any] = {}


def scan(
    target: Any,
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
    methods: Any = None,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Any:
    """`flax.linen.scan` on NNX: runs a module class, or a function of a module, in a loop.

    The function has the signature ``(mdl, carry, *xs) -> (carry, ys)``, and so has the result.

    Args:
      target: a class of NNX modules, or a function of a module. The module may be a pytree of
        modules; modules among the other arguments are lifted too.
      variable_axes: for each collection the axis along which its Variables have a value for each
        step. `In` and `Out` say so for one direction. A collection that is named nowhere is not
        visible inside.
      variable_broadcast: filter of the collections whose Variables are the same for all steps.
        What a step writes to one must not depend on the step.
      variable_carry: filter of the collections whose Variables go from step to step.
      split_rngs: for each RNG stream whether each step gets another key (the keys are
        `jax.random.split` of the stream's) or all the same. A stream that is not named is not
        visible inside. NNX's stream ``default`` is named ``params``, too.
      in_axes: axes of the arguments after the carry, as a prefix of them; `broadcast` for one that
        each step gets whole.
      out_axes: axes of ``ys``, as a prefix of it; `broadcast` for one that does not depend on the
        step.
      length: number of steps, where neither an argument nor a Variable tells it. A class whose
        Variables get an axis needs it, as they are made before any argument is known.
      reverse: whether the last step comes first.
      unroll: number of steps in one iteration of the loop.
      data_transform: ``(variable_groups, rng_groups) -> (variable_groups, rng_groups)``, called
        inside with the Variables of one step as Linen has them: a tuple of groups (broadcast,
        carry, then ``variable_axes``), each a tuple with nested dicts by collection for each
        module; and the keys, a dict for each module for each entry of ``split_rngs``.
      metadata_params: ``{nn.PARTITION_NAME: name}``, the name of the axis in sharding metadata.
      methods: the methods of a class to lift, by default ``__call__``; or a dict with options for
        each, which agree on what says how the Variables are made.
      _split_transpose: as for `jax.lax.scan`.
      check_constancy_invariants: whether to check that what is broadcast and written does not
        depend on the step. The check traces the function once more, only where there is such.

    Returns:
      A class or a function, as ``target`` is. The class inherits from ``target``; its instances
      have their Variables in the same places, with the axis.

    Raises:
      TypeError: the target is neither, options have the wrong type, no pair is returned, or the
        carry holds a module or a Variable, or changes its structure, a shape or a dtype.
      ValueError: lengths disagree, a filter names a collection twice, a collection or a stream
        that is not named is used, or a broadcast Variable is written differently per step.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.dense = nnx.Linear(3, 3, rngs=rngs)
      ...     def __call__(self, x, _):
      ...         return x + jnp.tanh(self.dense(x)), None
      >>> Blocks = nn.scan(
      ...     Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=4
      ... )
      >>> blocks = Blocks(nnx.Rngs(0))
      >>> y, _ = blocks(jnp.ones((2, 3)), None)
      >>> blocks.dense.kernel.shape, y.shape
      ((4, 3, 3), (2, 3))

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    options = {
        "variable_axes": variable_axes,
        "variable_broadcast": variable_broadcast,
        "variable_carry": variable_carry,
        "split_rngs": split_rngs,
        "in_axes": in_axes,
        "out_axes": out_axes,
        "length": length,
        "reverse": reverse,
        "unroll": unroll,
        "data_transform": data_transform,
        "metadata_params": metadata_params,
        "_split_transpose": _split_transpose,
        "check_constancy_invariants": check_constancy_invariants,
    }
    return lift_target("scan", target, scanned, options, methods, scanned_init)


def scanned(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
    check_constancy_invariants: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """The function ``fn`` in a loop; see `scan`."""
    plan = _plan(variable_axes, variable_broadcast, variable_carry, split_rngs)

    @functools.wraps(fn)
    def looped(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        given = bind(fn, args, kwargs)
        if not given:
            raise TypeError("scan: the carry is missing: call it with (mdl, carry, *xs).")
        check_carry("scan", given[0])
        inner, mdl, args = with_targets(fn, mdl, given)
        carry, *xs = args
        lifting = Lifting(plan, mdl, metadata_params)
        axes = axes_of("scan", in_axes, tuple(xs), nothing=broadcast)
        if args is not given:
            check_variables(plan, in_axes, given[1:], nothing=broadcast)
        size = agreed("scan", "length", length, [*sizes_of(axes, tuple(xs)), *lifting.sizes()])
        loop = Loop(lifting, inner, size, carry, tuple(xs), axes, out_axes, data_transform)
        options["length"] = size
        with loop.explained():
            if loop.needs_room:
                loop.make_room(check_constancy_invariants)
            result = jax.lax.scan(loop.step, loop.start, loop.slices, **options)
            if loop.needs_room:
                loop.make_room(check_constancy_invariants)
                result = jax.lax.scan(loop.step, loop.start, loop.slices, **options)
        return loop.finish(result)

    return looped


def scanned_init(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    length: int | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
) -> Callable[..., None]:
    """The ``__init__`` ``fn`` of a class that `scan` lifts: it makes the Variables of all steps."""
    plan = _plan(variable_axes, variable_broadcast, variable_carry, split_rngs)
    return vmapped_init(fn, plan, "length", length, metadata_params)


def _plan(variable_axes: Any, variable_broadcast: Any, variable_carry: Any, split: Any) -> Plan:
    fixed = [
        ("variable_broadcast", variable_broadcast, Kept.BROADCAST),
        ("variable_carry", variable_carry, Kept.CARRY),
    ]
    rules = [Rule(f"{name}={filter!r}", filter, kept, kept) for name, filter, kept in fixed]
    return Plan.make("scan", rules + rules_of_axes("scan", variable_axes, none=False), split)
