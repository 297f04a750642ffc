"""Derivatives of what a model sows and perturbs, in one pass: `capture_grad` and `capture_jvp`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lifted
from lifted._engine import split_aux
from lifted._group import Filter, is_target
from lifted._trees import Static, structure
from nnx_bridge.captures._method_outputs import is_call
from nnx_bridge.captures._recording import Kind, Recording, collection, record

Outputs = bool | Callable[[Any, str], bool]


@dataclasses.dataclass(frozen=True)
class CapturedGrad:
    """What `capture_grad` returns.

    Attributes:
      value: the scalar that ``fn`` returned.
      grads: its gradients, in the form of `lifted.grad`: ``(variable_grads, *primal_grads)``.
      intermediates: what was sown.
      intermediate_grads: the gradient at every perturbed value.
      aux: the second value of ``fn`` with ``has_aux``.
    """

    value: Any
    grads: Any
    intermediates: Any
    intermediate_grads: Any
    aux: Any = None


def capture_grad(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = "params",
    argnums: int | Sequence[int] | None = None,
    intermediates: Kind = "intermediates",
    perturbations: Kind = "perturbations",
    capture_intermediates: Outputs = False,
) -> CapturedGrad:
    """Value, gradients, sown values and the gradients at perturbed values, in one pass.

    It replaces the recipe of four steps in the documentation of `nnx.Module.perturb`: the shapes of
    the perturbations are found without running the model (step 1), one forward and one backward
    pass (steps 2 and 3) give all results, and ``intermediate_grads`` is what is merged with
    ``intermediates`` in step 4. On Linen modules it takes the place of ``apply(mutable=...)`` with
    the collections ``intermediates`` and ``perturbations``.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a real scalar, or a pair ``(scalar, aux)``.
      mdl: an NNX module, a bound Linen module, a `flax.core.Scope`, or a pytree of these.
      *primals: pytrees of arrays.
      has_aux: whether ``fn`` returns a pair.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      grad_variables: filter of the variables to differentiate with respect to; False for none.
      argnums: primals to differentiate with respect to; all of them by default.
      intermediates: collection or Variable type of the sown values.
      perturbations: collection or Variable type of the perturbed values.
      capture_intermediates: whether the output of every ``__call__`` is sown too, or a function
        ``(module, method_name) -> bool`` that selects methods, as in Linen.

    Returns:
      A `CapturedGrad`. Its trees have the structure of ``mdl``: an `nnx.State` for an NNX module,
      the content of the collection for a Linen module. Equal models give equal paths.

    Raises: as `lifted.grad`.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __call__(self, x):
      ...         x2 = self.perturb("grad_of_x", x)
      ...         return 3 * x2
      >>> result = nnx_bridge.capture_grad(lambda mdl, x: mdl(x), Model(), 1.0)
      >>> print(result.intermediate_grads["grad_of_x"].get_value())
      3.0

    Source: https://flax.readthedocs.io/en/latest/guides/extracting_intermediates.html
    """
    target = _Target(mdl, intermediates, perturbations, _outputs(capture_intermediates))
    perturbed = target.perturbations(fn, primals, variables, grad_variables, rngs)
    zeros, form = jax.tree.leaves(perturbed), structure(perturbed)
    # Sharded, and varying over the axes of a `jax.shard_map`, as the values that they are added to:
    # otherwise their gradients would be gathered, or summed over these axes.
    seeds = [jnp.zeros_like(zero) for zero in zeros]

    def seeded(mdl: Any, seeds: list[Any], *primals: Any) -> Any:
        out, (sown, _) = target.record(fn, mdl, primals, form.unflatten(seeds))
        y, aux = split_aux("capture_grad", out, has_aux)
        return y, (aux, jax.tree.leaves(sown), Static(structure(sown)))

    chosen = range(len(primals)) if argnums is None else np.atleast_1d(argnums).tolist()
    (value, (aux, leaves, treedef)), grads = lifted.value_and_grad(
        seeded,
        mdl,
        seeds,
        *primals,
        has_aux=True,
        variables=variables,
        rngs=rngs,
        grad_variables=grad_variables,
        argnums=(0, *(i % len(primals) + 1 for i in chosen)),
    )
    part = () if grad_variables is False else grads[:1]
    of_seeds, *of_primals = grads[len(part) :]
    result = (*part, *of_primals)
    return CapturedGrad(
        value,
        result[0] if isinstance(argnums, int) and not part else result,
        treedef.value.unflatten(leaves),
        form.unflatten(of_seeds),
        aux,
    )


@dataclasses.dataclass(frozen=True)
class CapturedJvp:
    """What `capture_jvp` returns.

    Attributes:
      value: what ``fn`` returned.
      tangent: its tangent.
      intermediates: what was sown.
      intermediate_tangents: the tangent of everything that was sown.
      aux: the second value of ``fn`` with ``has_aux``.
    """

    value: Any
    tangent: Any
    intermediates: Any
    intermediate_tangents: Any
    aux: Any = None


def capture_jvp(
    fn: Callable[..., Any],
    mdl: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Any = None,
    *,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    intermediates: Kind = "intermediates",
    capture_intermediates: Outputs = False,
) -> CapturedJvp:
    """Value, tangent, sown values and the tangents of sown values, in one pass.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a pytree of arrays, or a pair ``(pytree,
        aux)``.
      mdl: an NNX module, a bound Linen module, a `flax.core.Scope`, or a pytree of these.
      primals: tuple or list of pytrees of arrays.
      tangents: their tangents, as of `lifted.jvp`.
      variable_tangents: tangents of the variables, as of `lifted.jvp`.
      has_aux: whether ``fn`` returns a pair.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      intermediates: collection or Variable type of the sown values.
      capture_intermediates: as of `capture_grad`.

    Returns:
      A `CapturedJvp`, with trees in the form of those of `CapturedGrad`.

    Raises: as `lifted.jvp`.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge
      >>> from flax import nnx
      >>> class Square(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "square", x**2)
      ...         return 3 * x**2
      >>> result = nnx_bridge.capture_jvp(lambda mdl, x: mdl(x), Square(), (2.0,), (1.0,))
      >>> print(result.tangent, result.intermediate_tangents["square"].get_value()[0])
      12.0 4.0

    Source: https://flax.readthedocs.io/en/latest/guides/extracting_intermediates.html
    """
    target = _Target(mdl, intermediates, None, _outputs(capture_intermediates))

    def recorded(mdl: Any, *primals: Any) -> Any:
        out, (sown, *_) = target.record(fn, mdl, primals, None)
        y, aux = split_aux("capture_jvp", out, has_aux)
        return (y, jax.tree.leaves(sown)), (aux, Static(structure(sown)))

    (value, leaves), (tangent, dots), (aux, treedef) = lifted.jvp(
        recorded, mdl, primals, tangents, variable_tangents, variables, rngs, has_aux=True
    )
    unflatten = treedef.value.unflatten
    return CapturedJvp(value, tangent, unflatten(leaves), unflatten(dots), aux)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A target, and what is recorded in it."""

    mdl: Any
    intermediates: Kind
    perturbing: Kind | None
    outputs: Callable[[Any, str], bool] | None

    def record(self, fn: Callable[..., Any], mdl: Any, primals: Sequence[Any], seeds: Any) -> Any:
        """The result of ``fn`` and what was recorded, with ``seeds`` for the perturbations."""
        kinds = (
            (self.intermediates,)
            if self.perturbing is None
            else (self.intermediates, self.perturbing)
        )
        recording = Recording(kinds, self._seeds(seeds), self.outputs)
        return record(lambda mdl: fn(mdl, *primals), mdl, recording)

    def perturbations(
        self,
        fn: Callable[..., Any],
        primals: Sequence[Any],
        variables: Filter,
        frozen: Filter,
        rngs: Filter,
    ) -> Any:
        """Shapes and dtypes of the perturbed values, found without running ``fn``."""
        functional = lifted.functionalize(self.mdl, variables=variables, frozen=frozen, rngs=rngs)

        def found() -> Any:
            call = lambda mdl: self.record(fn, mdl, primals, None)  # noqa: E731
            (_, (_, zeros)), _ = functional(functional.variables, call)
            return zeros

        return jax.eval_shape(found)

    def _seeds(self, seeds: Any) -> list[Any] | None:
        if seeds is None or self.perturbing is None:
            return None
        treedef: Any = jax.tree.structure(self.mdl, is_leaf=is_target)
        name = collection(self.perturbing)
        flat = treedef.flatten_up_to(seeds)
        return [seed if isinstance(seed, nnx.State) else {name: seed} for seed in flat]


def _outputs(capture_intermediates: Outputs) -> Callable[[Any, str], bool] | None:
    if isinstance(capture_intermediates, bool):
        return is_call if capture_intermediates else None
    return capture_intermediates
