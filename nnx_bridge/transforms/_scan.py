"""`scan`: a function of a module in a loop with a fixed number of steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import broadcast

from nnx_bridge.transforms._arguments import agreed, axes_of, bind, sizes_of
from nnx_bridge.transforms._invariants import varying_outputs
from nnx_bridge.transforms._lifting import Form, Inputs, Key, Lifting
from nnx_bridge.transforms._linen_form import data_transformed
from nnx_bridge.transforms._plan import Kept, Plan, Rule, rules_of_axes
from nnx_bridge.transforms._targets import check_output, lift_target, with_targets
from nnx_bridge.transforms._vmap import vmapped_init

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
        each.
      _split_transpose: as for `jax.lax.scan`.
      check_constancy_invariants: whether to check that what is broadcast and written does not
        depend on the step. The check traces the function once more, only where there is such.

    Returns:
      A class or a function, as ``target`` is. The class inherits from ``target``; its instances
      have their Variables in the same places, with the axis.

    Raises:
      TypeError: the target is neither, options have the wrong type, or no pair is returned.
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
        inner, mdl, args = with_targets(fn, mdl, bind(fn, args, kwargs))
        if not args:
            raise TypeError("scan: the carry is missing: call it with (mdl, carry, *xs).")
        carry, *xs = args
        lifting = Lifting(plan, mdl, metadata_params)
        axes = axes_of("scan", in_axes, tuple(xs), nothing=broadcast)
        size = agreed("scan", "length", length, [*sizes_of(axes, tuple(xs)), *lifting.sizes()])
        loop = _Loop(lifting, inner, size, tuple(xs), axes, out_axes, data_transform)
        return loop.run(carry, check_constancy_invariants, {"length": size, **options})

    return looped


def scanned_init(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, Any] = _NO_OPTIONS,
    variable_broadcast: Any = False,
    variable_carry: Any = False,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
    length: int | None = None,
    metadata_params: Mapping[Any, Any] = _NO_OPTIONS,
    **others: Any,
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


class _Loop:
    """One call.

    What every step writes alike (the counts of RNG streams, broadcast Variables, outputs with the
    axis `broadcast`) leaves the loop as a part of the carry that no step reads.
    """

    def __init__(
        self,
        lifting: Lifting,
        fn: Callable[..., Any],
        size: int,
        xs: tuple[Any, ...],
        axes: Sequence[Any],
        out_axes: Any,
        data_transform: Callable[..., Any] | None,
    ) -> None:
        self._lifting, self._fn, self._out_axes = lifting, fn, out_axes
        self._data_transform = data_transform
        self._inputs: Inputs = lifting.inputs(size)
        self._along = list(self._inputs.axes)
        self._xs, treedef = jax.tree.flatten(xs)
        self._xs_treedef: Any = treedef
        self._xs_axes = axes
        self._forms: list[Form] = []
        self._ys: list[tuple[Any, list[Any]]] = []
        # What leaves the loop as every step writes it, and what else has been found to.
        self._alike: dict[Key, Any] = {key: lifting.parts[key] for key in self._inputs.counts}
        self._found: dict[Key, None] = {}

    def run(self, carry: Any, check: bool, options: Mapping[str, Any]) -> Any:
        both = zip(self._xs, self._xs_axes, strict=True)
        xs = [_to_front(x, axis) for x, axis in both if axis is not broadcast]
        slices = [
            [_to_front(x, axis) for x in values] for axis, values in self._inputs.axes.items()
        ]
        if broadcast in jax.tree.leaves(self._out_axes):
            self._make_room(carry, (xs, slices), check)
        result = self._scan(carry, (xs, slices), options)
        if self._found:
            self._make_room(carry, (xs, slices), check)
            result = self._scan(carry, (xs, slices), options)
        (carry, carried, alike), (ys, axes) = result
        kept = dict(zip(self._inputs.carried, carried, strict=True))
        kept |= dict(zip(self._alike, alike, strict=True))
        values = {
            axis: [_from_front(x, axis) for x in of_axis]
            for axis, of_axis in zip(self._lifting.plan.axes_out, axes, strict=True)
        }
        self._lifting.publish(self._forms[-1], values, kept)
        treedef, y_axes = self._ys[-1]
        stacked = iter(ys)
        outputs = [
            kept[_Output(i)] if axis is broadcast else _from_front(next(stacked), axis)
            for i, axis in enumerate(y_axes)
        ]
        return carry, treedef.unflatten(outputs)

    def _make_room(self, carry: Any, xs: Any, check: bool) -> None:
        """Gives what is written by every step alike a place in the carry.

        Raises:
          ValueError: it is to be checked, and depends on the step.
        """
        state = carry, list(self._inputs.carried.values()), list(self._alike.values())
        first = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), xs)
        found = functools.partial(self._step, found_only=True)
        program, shapes = jax.make_jaxpr(found, return_shape=True)(state, first)
        alike = len(jax.tree.leaves(state[2]))
        varies = [True] * len(program.in_avals)
        start = len(jax.tree.leaves(state[:2]))
        varies[start : start + alike] = [False] * alike
        outputs = zip(self._found, shapes, varying_outputs(program, varies), strict=True)
        for key, shape, varying in outputs:
            if varying and check:
                raise ValueError(
                    f"scan: leaf {key.number} of the output depends on the step, but out_axes says "
                    "that it is broadcast. Give it an axis."
                    if isinstance(key, _Output)
                    else self._lifting.differs(key)
                )
            self._alike[key] = jnp.zeros(shape.shape, shape.dtype)
        self._found.clear()

    def _scan(self, carry: Any, xs: Any, options: Mapping[str, Any]) -> Any:
        start = carry, list(self._inputs.carried.values()), list(self._alike.values())
        try:
            return jax.lax.scan(self._step, start, xs, **options)
        except AttributeError as error:
            raise self._lifting.explain(error) from error

    def _step(self, state: Any, xs: Any, *, found_only: bool = False) -> Any:
        carry, carried, _ = state
        of_args, slices = xs
        step = self._inputs.step(dict(zip(self._along, slices, strict=True)), carried)
        variables = step.variables
        if self._data_transform is not None:
            variables = data_transformed(
                self._lifting.functional, self._lifting.plan, variables, self._data_transform
            )
        each = iter(of_args)
        args = self._xs_treedef.unflatten(
            [
                x if axis is broadcast else next(each)
                for x, axis in zip(self._xs, self._xs_axes, strict=True)
            ]
        )
        y, updates = self._lifting.functional(variables, self._fn, carry, *args)
        check_output("scan", y)
        if not isinstance(y, (tuple, list)) or len(y) != 2:
            raise TypeError(
                "scan: the function must return a pair (carry, ys), as for jax.lax.scan; got "
                f"{jax.tree.structure(y)}."
            )
        carry, ys = y
        taken = step.take(updates)
        ys, structure = jax.tree.flatten(ys)
        treedef: Any = structure
        y_axes = axes_of("scan", self._out_axes, treedef.unflatten(ys), broadcast, "out_axes")
        self._ys.append((treedef, y_axes))
        kept = taken.kept
        kept |= {_Output(i): y for i, y in enumerate(ys) if y_axes[i] is broadcast}
        stacked = [y for y, axis in zip(ys, y_axes, strict=True) if axis is not broadcast]
        after = [kept.pop(key, x) for key, x in zip(self._inputs.carried, carried, strict=True)]
        alike = [
            kept.pop(key, self._lifting.parts[key] if isinstance(key, int) else was)
            for key, was in self._alike.items()
        ]
        self._found |= dict.fromkeys(kept)
        if found_only:
            return list(kept.values())
        self._forms.append(taken.form)
        axes = [taken.axes.get(axis, []) for axis in self._lifting.plan.axes_out]
        return (carry, after, alike), (stacked, axes)


@dataclasses.dataclass(frozen=True)
class _Output:
    """The key of a leaf of the output whose axis is `broadcast`."""

    number: int


def _to_front(x: Any, axis: int) -> Any:
    return x if axis == 0 else jnp.moveaxis(x, axis, 0)


def _from_front(x: Any, axis: int) -> Any:
    return x if axis == 0 else jnp.moveaxis(x, 0, axis)
