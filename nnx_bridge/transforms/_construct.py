"""How a lifted class makes its Variables: with the axes that its methods expect."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from lifted._errors import path_text
from nnx_bridge.transforms._arguments import agreed
from nnx_bridge.transforms._lifting import Lifting
from nnx_bridge.transforms._mapped import Mapped
from nnx_bridge.transforms._plan import Plan
from nnx_bridge.transforms._targets import functionalized, with_targets


def vmapped_init(
    fn: Callable[..., Any],
    plan: Plan,
    argument: str,
    size: int | None,
    metadata_params: Mapping[Any, Any],
    **options: Any,
) -> Callable[..., None]:
    """The ``__init__`` ``fn`` of a class whose Variables get the axes of a plan.

    Args:
      fn: the ``__init__``.
      plan: of the transform.
      argument: of the transform, that gives the size of the axis.
      size: what it gives.
      metadata_params: of the transform.
      **options: of `jax.vmap`.
    """

    plan = plan.creating()

    @functools.wraps(fn)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        def make(mdl: Any, args: Any, kwargs: Any) -> None:
            fn(mdl, *args, **kwargs)

        inner, mdl, given = with_targets(make, self, (args, kwargs))
        if size is None or not plan.has_axes:
            _init_once(plan, argument, lambda mdl: inner(mdl, *given), mdl)
            return
        lifting = Lifting(plan, mdl, metadata_params)
        agreed(plan.name, argument, size, lifting.sizes())  # Of modules that were given.
        of_size = {"axis_size": size, **options}
        Mapped(lifting, lambda mdl: inner(mdl, *given), (), 0, None, of_size).run()

    return init


def _init_once(plan: Plan, argument: str, fn: Callable[..., Any], mdl: Any) -> None:
    """Makes a module in which no Variable has an axis."""
    functional = functionalized(plan.name, mdl)
    _, updates = functional(functional.variables, fn)
    for entry in updates[0].written()[0]:
        path, leaf = entry.path[1:], entry.leaf
        if entry.before is None and isinstance(leaf, nnx.Variable):
            if isinstance(leaf, nnx.RngState):
                continue
            where = plan.out(path, leaf, None)
            if isinstance(where, int):
                raise ValueError(
                    f"{plan.name}: the class makes {path_text(path)} with the axis {where}, before "
                    f"any argument of a call is known. Pass {argument}=, the size of that axis."
                )
    functional.publish(updates)
