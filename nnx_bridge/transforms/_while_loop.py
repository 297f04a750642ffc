"""`while_loop`: a function of a module in a loop that ends when another one says so."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lifted._engine import unbound
from nnx_bridge.transforms._carry import Carries
from nnx_bridge.transforms._inputs import Inputs
from nnx_bridge.transforms._lifting import Form, Lifting
from nnx_bridge.transforms._plan import Kept, Plan, Rule
from nnx_bridge.transforms._targets import check_carry, check_output

_NO_OPTIONS: Mapping[Any, bool] = {}


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    mdl: Any,
    init: Any,
    carry_variables: Any = False,
    broadcast_variables: Any = True,
    split_rngs: Mapping[Any, bool] = _NO_OPTIONS,
) -> Any:
    """`flax.linen.while_loop` on NNX: calls a function of a module as long as another one says so.

    Args:
      cond_fn: ``(mdl, carry) -> bool``; whether the loop goes on. It writes nothing.
      body_fn: ``(mdl, carry) -> carry``; one step. It creates no Variables, and those that it
        writes keep their shapes and dtypes.
      mdl: an NNX module, or a pytree of them.
      init: the first carry.
      carry_variables: filter of the collections whose Variables go from step to step.
      broadcast_variables: filter of the collections that are visible and are not written.
      split_rngs: for each RNG stream whether each step gets another key (`jax.random.fold_in` of
        the stream's with the number of the step) or all the same. A stream that is not named is not
        visible inside. NNX's stream ``default`` is named ``params``, too.

    Returns:
      The last carry.

    Raises:
      TypeError: a function is none, or the carry holds a module or a Variable, or changes its
        structure, a shape or a dtype.
      ValueError: a Variable is written that is not carried, or one that is changes its shape or
        dtype; or a filter names a collection twice.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge as nn
      >>> from flax import nnx
      >>> class Halves(nnx.Module):
      ...     def __init__(self):
      ...         self.count = nnx.BatchStat(jnp.array(0))
      ...     def __call__(self, x):
      ...         self.count[...] += 1
      ...         return x / 2
      >>> mdl = Halves()
      >>> x = nn.while_loop(
      ...     lambda mdl, x: x > 1, lambda mdl, x: mdl(x), mdl, 8.0, carry_variables='batch_stats'
      ... )
      >>> float(x), int(mdl.count[...])
      (1.0, 3)

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    check_carry("while_loop", init)
    cond_fn, body_fn = (unbound("while_loop", fn, mdl) for fn in (cond_fn, body_fn))
    rules = [
        Rule(f"carry_variables={carry_variables!r}", carry_variables, Kept.CARRY, Kept.CARRY),
        Rule(
            f"broadcast_variables={broadcast_variables!r}",
            broadcast_variables,
            Kept.BROADCAST,
            Kept.NOWHERE,
        ),
    ]
    lifting = Lifting(Plan.make("while_loop", rules, split_rngs), mdl, {})
    inputs = Inputs(lifting, None)
    keys = inputs.axes.get(0, [])
    forms: list[Form] = []
    carries = Carries("while_loop")

    def step(state: Any, sign: int) -> Any:
        number, _, carried, _ = state
        folded = [jax.random.fold_in(key, sign * number) for key in keys]
        return inputs.step({0: folded}, carried)

    def goes_on(state: Any) -> Any:
        of_step = step(state, -1)
        with of_step.opened() as (mdl, take):
            result = cond_fn(mdl, state[1])
            taken = take()
        for leaf in taken.form.leaves if set(taken.kept) - set(inputs.counts) else ():
            raise ValueError(
                f"while_loop: cond_fn writes {'/'.join(map(str, leaf.path))}; write it in body_fn."
            )
        return result

    def body(state: Any) -> Any:
        number, carry, carried, highest = state
        of_step = step(state, 1)
        with of_step.opened() as (mdl, take):
            after_step = body_fn(mdl, carry)
            taken = take()
        check_output("while_loop", after_step)
        carries.note(carry, after_step)
        kept = taken.kept
        after = [kept.pop(key, x) for key, x in zip(inputs.carried, carried, strict=True)]
        counts = [kept.pop(key, lifting.parts[key]) for key in inputs.counts]
        # Where only some steps draw, no later call draws their keys.
        counts = list(map(jnp.maximum, counts, highest))
        for key in kept:
            raise ValueError(lifting.differs(key))
        forms.append(taken.form)
        return None if number is None else number + 1, after_step, after, counts

    start = (
        0 if keys else None,
        init,
        list(inputs.carried.values()),
        [lifting.parts[key] for key in inputs.counts],
    )
    try:
        with carries.explained():
            _, carry, carried, counts = jax.lax.while_loop(goes_on, body, start)
    except AttributeError as error:
        raise lifting.explain(error) from error
    kept = dict(zip((*inputs.carried, *inputs.counts), (*carried, *counts), strict=True))
    lifting.publish(forms[-1], {}, kept)
    return carry
