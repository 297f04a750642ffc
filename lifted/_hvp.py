"""Products of second derivatives with a direction: `hvp`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lifted._engine import Call, check_scalar, check_selects
from lifted._forward import Direction
from lifted._group import Filter, Updates, Variables
from lifted._inputs import Inputs, Selection


def hvp(
    fn: Callable[..., Any],
    mdl: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Any = None,
    variables: Filter = True,
    rngs: Filter = True,
    *,
    has_aux: bool = False,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
) -> Any:
    """The product of the second derivatives of a scalar function of a module with a direction.

    It is the derivative of `grad` along the direction, by forward over reverse mode: about twice
    the cost of a gradient, and no matrix is formed.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a real scalar, or a pair ``(scalar, aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      primals: tuple or list of pytrees of arrays.
      tangents: the part of the direction in the primals, as of `jvp`.
      variable_tangents: the part of the direction in the variables, as of `jvp`.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      grad_variables: filter of the variables whose part of the product is returned.
      argnums: primals whose part of the product is returned; all of them by default, ``()`` for
        none.

    Returns:
      The product in the form of the result of `grad`; with ``has_aux`` ``(product, aux)``.

    Raises: as `grad` and `jvp`.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class Cubic(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return jnp.sum(self.param("scale", nn.initializers.ones, (2,)) * x**3)
      >>> x, v = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
      >>> bound = Cubic().bind({"params": {"scale": jnp.ones(2)}})
      >>> (product,) = lifted.hvp(lambda mdl, x: mdl(x), bound, (x,), (v,))
      >>> product.tolist()
      [6.0, 12.0]
      >>> params, _ = lifted.hvp(lambda mdl, x: mdl(x), bound, (x,), (v,), grad_variables="params")
      >>> params["params"]["scale"].tolist()
      [3.0, 12.0]

    Source: B. A. Pearlmutter, Fast Exact Multiplication by the Hessian, Neural Computation 6(1),
    1994.
    """
    direction = Direction.make("hvp", primals, tangents, variable_tangents)
    visible = direction.visible(mdl)
    call = Call.make(
        "hvp",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=(*visible, grad_variables),
        rngs=rngs,
    )
    selection = Selection.make("hvp", grad_variables, argnums, call.primals)
    scalar = check_scalar("hvp", False)

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        moved, active = direction.inputs(call.functional, variables)
        asked = selection.inputs(call.functional, variables, call.primals)

        def gradient(values: list[Any]) -> tuple[list[Any], Any]:
            here = Inputs(jax.tree.leaves(moved.merge(values)), asked.treedef, asked.active)
            return jax.grad(call.pure(here, scalar), has_aux=True)(here.values)

        _, product, (aux, updates) = jax.jvp(gradient, (moved.values,), (active,), has_aux=True)
        result = selection.layout(call.functional, asked).fill(product.__getitem__)
        return ((result, aux) if has_aux else result), updates

    def validate(variables: Variables) -> None:
        check_selects(call, grad_variables, "grad_variables")(variables)
        direction.validate(call.functional)(variables)

    return call.finish(attempt, True, validate)
