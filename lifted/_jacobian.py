"""Jacobians: `jacfwd`, `jacrev`, `hessian`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lifted._engine import Call, check_arrays, check_inputs, check_selects
from lifted._group import Filter, Updates, Variables
from lifted._inputs import Layout, Selection, zeros_float0
from lifted._trees import Static


def jacfwd(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
) -> Any:
    """The Jacobian of a function of a module by forward mode; as `jax.jacfwd`.

    Use it for a function with few inputs. For the output together with the Jacobian return the
    output as ``aux`` too.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a pytree of arrays, or a pair ``(pytree,
        aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      *primals: pytrees of real arrays.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      grad_variables: filter of the variables to differentiate with respect to, as of
        `value_and_grad`.
      argnums: primals to differentiate with respect to; all of them by default.
      holomorphic: whether ``fn`` is holomorphic, as in JAX.

    Returns:
      The structure of the output of ``fn``, each leaf of which is replaced by the tuple that `grad`
      would return; an entry has the shape of the output followed by that of the input. With
      ``has_aux`` ``(jacobian, aux)``.

    Raises:
      TypeError: an input is not real (complex with ``holomorphic``); ``fn`` does not return a pair
        though ``has_aux`` says so.
      ValueError: nothing is selected; a module is not bound.

    Example:
      The Jacobian of a submodule inside a module, together with its output (google/flax #735).

      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class OutputAndJacobian(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         def twice(mdl, x):
      ...             y = mdl(x)
      ...             return y, y
      ...         (jacobian,), y = lifted.jacfwd(twice, nn.Dense(2), x, has_aux=True)
      ...         return y, jacobian
      >>> x = jnp.ones(3)
      >>> variables = OutputAndJacobian().init(jax.random.key(0), x)
      >>> y, jacobian = OutputAndJacobian().apply(variables, x)
      >>> bool((jacobian == variables["params"]["Dense_0"]["kernel"].T).all())
      True

    Source: https://docs.jax.dev/en/latest/_autosummary/jax.jacfwd.html
    """
    call = Call.make(
        "jacfwd",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    return _jacobian(call, jax.jacfwd, grad_variables, argnums, holomorphic, order=1)


def jacrev(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
) -> Any:
    """The Jacobian of a function of a module by reverse mode; as `jax.jacrev`.

    Use it for a function with few outputs; arguments, results and errors are those of `jacfwd`.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> dense = nn.Dense(2)
      >>> x = jnp.ones(3)
      >>> bound = dense.bind(dense.init(jax.random.key(0), x))
      >>> jacobian, _ = lifted.jacrev(lambda mdl, x: mdl(x), bound, x, grad_variables="params")
      >>> jacobian["params"]["kernel"].shape
      (2, 3, 2)

    Source: https://docs.jax.dev/en/latest/_autosummary/jax.jacrev.html
    """
    call = Call.make(
        "jacrev",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    return _jacobian(call, jax.jacrev, grad_variables, argnums, holomorphic, order=1)


def hessian(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
) -> Any:
    """The matrix of second derivatives of a function of a module; as `jax.hessian`.

    Arguments and errors are those of `jacfwd`.

    Returns:
      The structure of the output of ``fn``, each leaf of which is replaced by a tuple of tuples:
      entry ``[i][j]`` is the derivative with respect to inputs ``i`` and ``j`` in the order of
      `grad`, and has the shape of the output followed by those of the two inputs. Between pytrees
      it is a pytree of pytrees. With ``has_aux`` ``(hessian, aux)``.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class Quadratic(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return self.param("scale", nn.initializers.ones, ()) * jnp.vdot(x, x)
      >>> bound = Quadratic().bind({"params": {"scale": jnp.float32(2.0)}})
      >>> ((hessian,),) = lifted.hessian(lambda mdl, x: mdl(x), bound, jnp.ones(2))
      >>> hessian.tolist()
      [[4.0, 0.0], [0.0, 4.0]]

    Source: https://docs.jax.dev/en/latest/_autosummary/jax.hessian.html
    """
    call = Call.make(
        "hessian",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    return _jacobian(call, jax.hessian, grad_variables, argnums, holomorphic, order=2)


def _jacobian(
    call: Call,
    transform: Callable[..., Any],
    grad_variables: Filter,
    argnums: int | Sequence[int] | None,
    holomorphic: bool,
    order: int,
) -> Any:
    selection = Selection.make(call.name, grad_variables, argnums, call.primals)
    # As in JAX: forward mode has a use for any output, reverse mode for any input.
    input_kind: Any = np.complexfloating
    output_kind: Any = np.complexfloating
    if not holomorphic:
        input_kind = np.inexact if call.name == "jacrev" else np.floating
        output_kind = np.generic if call.name == "jacfwd" else np.floating

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        inputs = selection.inputs(call.functional, variables, call.primals)
        check_inputs(call.name, inputs, input_kind)
        pure = call.pure(inputs, check_arrays(call.name, output_kind))

        def leaves_of_output(values: list[Any]) -> tuple[list[Any], Any]:
            y, rest = pure(values)
            leaves, treedef = jax.tree.flatten(y)
            return leaves, (rest, Static((treedef, [np.shape(x) for x in leaves])))

        if inputs.active:
            derivatives, (rest, output) = transform(
                leaves_of_output, has_aux=True, holomorphic=holomorphic
            )(inputs.values)
        else:
            leaves, (rest, output) = leaves_of_output([])
            derivatives = [[] for _ in leaves]
        aux, updates = rest
        treedef, shapes = output.value
        layout = selection.layout(call.functional, inputs)
        entries = [
            _entry(layout, d, shape, order) for d, shape in zip(derivatives, shapes, strict=True)
        ]
        jacobian = treedef.unflatten(entries)
        return ((jacobian, aux) if call.has_aux else jacobian), updates

    validate = check_selects(call, grad_variables, "grad_variables")
    return call.finish(attempt, selection.filter, validate)


def _entry(layout: Layout, derivatives: Sequence[Any], shape: tuple[int, ...], order: int) -> Any:
    """The derivatives of one output in the form of the inputs, and for ``order`` 2 each of these
    once more."""
    if order == 1:
        return layout.fill(derivatives.__getitem__, lambda held: zeros_float0(shape + held))
    shapes = layout.active_shapes

    def zero(held: tuple[int, ...]) -> Any:
        return _entry(
            layout, [zeros_float0(shape + held + active) for active in shapes], shape + held, 1
        )

    return layout.fill(lambda k: _entry(layout, derivatives[k], shape + shapes[k], 1), zero)
