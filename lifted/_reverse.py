"""Reverse mode: `value_and_grad`, `grad`, `vjp`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lifted._engine import Call, check_inputs, check_scalar, check_selects
from lifted._group import Filter, Updates, Variables
from lifted._inputs import Layout, Selection, zeros_like_aval
from lifted._reduce import axis_names, psum_broadcast
from lifted._tangents import match_tangents


def value_and_grad(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Any] = (),
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
) -> tuple[Any, Any]:
    """The value of a scalar function of a module, and its gradient; as `jax.value_and_grad`.

    Use it inside a module to differentiate a submodule, or outside on a bound one. Gradients are
    with respect to the primals, and with respect to the variables that ``grad_variables`` selects.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a real scalar, or a pair ``(scalar, aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these; ``fn``
        gets one of the same structure.
      *primals: pytrees of arrays of any shape. Integers, booleans and keys get a ``float0`` zero
        for a gradient.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      reduce_axes: names of mapped axes (of `jax.vmap` or `jax.shard_map`). The gradient of what
        ``fn`` broadcasts over such an axis is summed over it; the gradient of what is mapped over
        it stays per example.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      grad_variables: filter of the variables to differentiate with respect to: a collection filter,
        or a predicate ``(path, value) -> bool``; on NNX modules also an NNX filter.
      argnums: primals to differentiate with respect to; all of them by default.
      holomorphic: whether ``fn`` is holomorphic, as in JAX.

    Returns:
      ``(y, grads)``, or ``((y, aux), grads)`` with ``has_aux``, where ``grads`` is what `grad`
      returns.

    Raises:
      TypeError: ``fn`` does not return a real scalar; it does not return a pair though ``has_aux``
        says so.
      ValueError: the output is not scalar; nothing is selected; a module is not bound.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class Energy(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         potential = nn.Dense(1, kernel_init=nn.initializers.ones)
      ...         total = lambda mdl, x: mdl(x).sum()
      ...         energy, (gradient,) = lifted.value_and_grad(total, potential, x)
      ...         return energy, -gradient
      >>> x = jnp.ones((2, 3))
      >>> energy, forces = Energy().apply(Energy().init(jax.random.key(0), x), x)
      >>> print(energy, forces.shape)
      6.0 (2, 3)

    Source:
    https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    call = Call.make(
        "value_and_grad",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    return _value_and_grad(call, grad_variables, reduce_axes, argnums, holomorphic)


def grad(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Any] = (),
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
) -> Any:
    """The gradient of a scalar function of a module; as `jax.grad`.

    Use it where the value is not wanted too; arguments and errors are those of `value_and_grad`.

    Returns:
      The gradients of the primals, a tuple also where there is one primal, as Linen's ``nn.grad``.
      With ``grad_variables`` ``(variable_grads, *primal_grads)``, where ``variable_grads`` has the
      structure of the selected variables: ``{collection: ...}`` for Linen, an `nnx.State` for NNX.
      With an int as ``argnums`` the gradient of that primal stands bare. With ``has_aux`` ``(grads,
      aux)``.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class LearnScale(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, y):
      ...         return self.param("scale", nn.initializers.ones, ()) * x * y
      >>> class Gradients(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, y):
      ...         scaled = lambda mdl, x, y: mdl(x, y)
      ...         return lifted.grad(scaled, LearnScale(), x, y, grad_variables="params")
      >>> variables = Gradients().init(jax.random.key(0), 2.0, 3.0)
      >>> grads, x_grad, y_grad = Gradients().apply(variables, 2.0, 3.0)
      >>> print(grads["params"]["scale"], x_grad, y_grad)
      6.0 3.0 2.0

    Source:
    https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    call = Call.make(
        "grad",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    value, grads = _value_and_grad(call, grad_variables, reduce_axes, argnums, holomorphic)
    return (grads, value[1]) if has_aux else grads


def _value_and_grad(
    call: Call,
    grad_variables: Filter,
    reduce_axes: Sequence[Any],
    argnums: int | Sequence[int] | None,
    holomorphic: bool,
) -> tuple[Any, Any]:
    selection = Selection.make(call.name, grad_variables, argnums, call.primals)
    axes = axis_names(call.name, reduce_axes)
    scalar = check_scalar(call.name, holomorphic)

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        inputs = selection.inputs(call.functional, variables, call.primals)
        if holomorphic:
            check_inputs(call.name, inputs, np.complexfloating)
        transform = jax.value_and_grad(
            call.pure(inputs, scalar), has_aux=True, holomorphic=holomorphic
        )
        (y, (aux, updates)), grads = transform(inputs.values)
        grads = psum_broadcast(inputs.values, grads, axes)
        value = (y, aux) if call.has_aux else y
        return (value, selection.layout(call.functional, inputs).fill(grads.__getitem__)), updates

    validate = check_selects(call, grad_variables, "grad_variables")
    return call.finish(attempt, selection.filter, validate)


def vjp(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Any] = (),
    vjp_variables: Filter = "params",
    variables: Filter = True,
    rngs: Filter = True,
    multi_scope: bool = False,
) -> tuple[Any, ...]:
    """A function of a module and its vector-Jacobian product; as `jax.vjp`.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a pytree of arrays, or a pair ``(pytree,
        aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      *primals: pytrees of arrays.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      reduce_axes: as of `value_and_grad`.
      vjp_variables: filter of the variables that get a cotangent, as ``grad_variables`` of
        `value_and_grad`.
      variables: filter of the variables that are visible to ``fn`` besides these, and may be
        updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      multi_scope: whether the cotangents of variables are a list with one entry for each scope, as
        in Linen: first those of modules that ``mdl`` was given, its own last. Otherwise the
        variables of such a module stand below the name of the attribute that holds it.

    Returns:
      ``(y, bwd)``, or ``(y, bwd, aux)`` with ``has_aux``. ``bwd(cotangent)``, with a cotangent of
      the structure of ``y``, returns ``(variable_cotangents, *primal_cotangents)``. It is a pytree
      and may leave `jax.jit`. An integer output takes None or a ``float0`` zero.

    Raises:
      TypeError: as `value_and_grad`; ``bwd`` where the cotangent has another structure or dtype
        than ``y``.
      ValueError: a module is not bound; ``bwd`` where the cotangent has another shape.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> dense = nn.Dense(2, kernel_init=nn.initializers.ones)
      >>> x = jnp.arange(3.0)
      >>> bound = dense.bind(dense.init(jax.random.key(0), x))
      >>> y, bwd = lifted.vjp(lambda mdl, x: mdl(x), bound, x)
      >>> variable_grads, x_grad = bwd(jnp.ones_like(y))
      >>> variable_grads["params"]["bias"].tolist(), x_grad.tolist()
      ([1.0, 1.0], [2.0, 2.0, 2.0])

    Source:
    https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    call = Call.make(
        "vjp",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=vjp_variables,
        rngs=rngs,
    )
    selection = Selection(vjp_variables, tuple(range(len(primals))), multi_scope)
    axes = axis_names("vjp", reduce_axes)

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        inputs = selection.inputs(call.functional, variables, call.primals)
        y, transpose, (aux, updates) = jax.vjp(call.pure(inputs), inputs.values, has_aux=True)
        outputs, treedef = jax.tree.flatten(y)
        pullback = _Pullback(
            selection.layout(call.functional, inputs),
            treedef,
            tuple(map(jax.typeof, map(_array, outputs))),
            axes,
        )
        bwd = jax.tree_util.Partial(pullback, transpose, inputs.values if axes else [])
        return ((y, bwd, aux) if has_aux else (y, bwd)), updates

    validate = check_selects(call, vjp_variables, "vjp_variables")
    return call.finish(attempt, vjp_variables, validate)


def _array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else jax.numpy.asarray(x)


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The static part of what `vjp` returns: the form of cotangents and of results."""

    layout: Layout
    treedef: Any
    outputs: tuple[Any, ...]
    axes: tuple[Any, ...]

    def __call__(self, transpose: Callable[..., Any], values: list[Any], *cotangent: Any) -> Any:
        if len(cotangent) != 1:
            raise TypeError(
                f"bwd(cotangent): expected 1 argument, of the structure {self.treedef}, got "
                f"{len(cotangent)}."
            )
        outputs = self.treedef.unflatten(self.outputs)
        matched = match_tangents(outputs, cotangent[0], ("cotangent",))
        complete = [
            zeros_like_aval(aval) if ct is None else ct
            for aval, ct in zip(self.outputs, matched, strict=True)
        ]
        (grads,) = transpose(self.treedef.unflatten(complete))
        return self.layout.fill(psum_broadcast(values, grads, self.axes).__getitem__)
