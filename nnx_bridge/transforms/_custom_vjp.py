"""`custom_vjp`: a function of a module with a backward pass of the user's."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from lifted._errors import describe, path_text
from lifted._functional import Structure
from lifted._nested import flat
from nnx_bridge.transforms._targets import bare, check_output, functionalized, with_targets


def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: Any = "params",
    nondiff_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """`flax.linen.custom_vjp` on NNX: a function of a module with its own backward pass.

    Args:
      fn: ``(mdl, *args) -> y``, which runs where nothing is differentiated.
      forward_fn: ``(mdl, *args) -> (y, residuals)``, which runs in its place otherwise. The
        function that `lifted.vjp` returns may be a residual.
      backward_fn: ``(*nondiff_args, residuals, t_y) -> (t_variables, *t_args)``. There is no module
        in it. Cotangents of the Variables of ``grad_vars`` may be an `nnx.State` or a Linen dict,
        and any may be left out or None, which means zero.
      grad_vars: filter of the collections that have a cotangent.
      nondiff_argnums: arguments that have none; 0 is the module.

    Returns:
      A function ``(mdl, *args) -> y``; what ``fn`` or ``forward_fn`` writes is written.

    Raises:
      TypeError: ``forward_fn`` or ``backward_fn`` returns something else.
      ValueError: ``nondiff_argnums`` names the module, or a cotangent is of no Variable or
        has another shape.

    Example:
      >>> import jax, jax.numpy as jnp, lifted, nnx_bridge as nn
      >>> from flax import nnx
      >>> def call(mdl, x):
      ...     return mdl(x)
      >>> def forward(mdl, x):
      ...     return lifted.vjp(call, mdl, x)
      >>> def backward(bwd, t_y):
      ...     t_params, t_x = bwd(t_y)
      ...     return jax.tree.map(jnp.sign, t_params), t_x
      >>> signed = nn.custom_vjp(call, forward, backward)
      >>> dense = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> x = jnp.array([-3.0, 2.0])
      >>> nnx.grad(lambda mdl: signed(mdl, x).sum())(dense).kernel[...].tolist()
      [[-1.0], [1.0]]

    Source: https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
    if 0 in numbers:
        raise ValueError(
            "custom_vjp: nondiff_argnums: 0 is the module; to leave its Variables out pass "
            "grad_vars=False."
        )

    @functools.wraps(fn)
    def call(mdl: Any, *args: Any) -> Any:
        inner, target, rest = with_targets(fn, mdl, args)
        inner_forward, _, _ = with_targets(forward_fn, mdl, args)
        functional = functionalized("custom_vjp", target)
        parts, flat_structure = jax.tree.flatten(functional.variables)
        treedef: Any = flat_structure
        # JAX keeps the three functions below, which must not keep the arrays of the module.
        pure = bare(functional)
        chosen = jax.tree.leaves(functional.match(functional.variables, grad_vars))

        def merge(graded: Sequence[Any], others: Sequence[Any]) -> Any:
            of_kind = {True: iter(graded), False: iter(others)}
            return treedef.unflatten([next(of_kind[is_graded]) for is_graded in chosen])

        def plain(graded: Any, others: Any, *args: Any) -> Any:
            y, updates = pure(merge(graded, others), inner, *args)
            check_output("custom_vjp", y)
            return y, updates

        def forward(graded: Any, others: Any, *args: Any) -> Any:
            out, updates = pure(merge(graded, others), inner_forward, *args)
            if not isinstance(out, (tuple, list)) or len(out) != 2:
                raise TypeError(
                    "custom_vjp: forward_fn must return a pair (y, residuals), got "
                    f"{jax.tree.structure(out)}."
                )
            y, residuals = out
            check_output("custom_vjp", y)
            return (y, updates), residuals

        def backward(*given: Any) -> Any:
            *nondiff, residuals, (t_y, _) = given
            result = backward_fn(*nondiff, residuals, t_y)
            if not isinstance(result, (tuple, list)) or not result:
                raise TypeError(
                    "custom_vjp: backward_fn must return a tuple (t_variables, *t_args), got "
                    f"{describe(result)}."
                )
            t_variables, *t_args = result
            cotangents = _cotangents(pure.structure, pure.variables, t_variables)
            wanted = [c for c, is_graded in zip(cotangents, chosen, strict=True) if is_graded]
            return wanted, None, *t_args

        differentiable = jax.custom_vjp(plain, nondiff_argnums=tuple(n + 1 for n in numbers))
        differentiable.defvjp(forward, backward)
        graded = [part for part, is_graded in zip(parts, chosen, strict=True) if is_graded]
        others = [part for part, is_graded in zip(parts, chosen, strict=True) if not is_graded]
        y, updates = differentiable(graded, others, *rest)
        functional.publish(updates)
        return y

    return call


def _cotangents(structure: Structure, like: Any, given: Any) -> list[Any]:
    """A cotangent for each array of the variables, None for zero.

    Args:
      structure: of the targets.
      like: variables of the targets, without their arrays.
      given: the cotangents, in any form.

    Raises:
      ValueError: one is of no Variable, or has another shape.
    """
    (per_target,) = structure.split(like)
    by_target = structure.as_variables(given, like)
    trees = [None] * len(per_target) if by_target is None else structure.split(by_target)[0]
    found: list[Any] = []
    for variables, tree in zip(per_target, trees, strict=True):
        if not isinstance(variables, nnx.State):
            found += [tree] if tree is None else jax.tree.leaves(tree)
            continue
        cotangents = dict(flat(tree, ())) if isinstance(tree, Mapping) else {}
        for path, leaf in nnx.to_flat_state(variables):
            parts = jax.tree.leaves(leaf)
            of_leaf = jax.tree.leaves(cotangents.pop(tuple(path), None)) or [None] * len(parts)
            for part, cotangent in zip(parts, of_leaf, strict=True):
                if cotangent is not None and np.shape(cotangent) != np.shape(part):
                    raise ValueError(
                        f"custom_vjp: backward_fn returns a cotangent of {path_text(path)} that is "
                        f"{describe(cotangent)}, but the Variable is {describe(part)}."
                    )
            found += of_leaf
        for path in cotangents:
            raise ValueError(
                f"custom_vjp: backward_fn returns a cotangent of {path_text(path)}, but the module "
                "has no such Variable."
            )
    return found
