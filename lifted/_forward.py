"""Forward mode: `jvp` and `linearize`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lifted._engine import Call, check_selects
from lifted._errors import describe
from lifted._functional import Functional, Structure
from lifted._group import Filter, Updates, Variables, group_of, is_target
from lifted._inputs import (
    Inputs,
    Layout,
    Selection,
    is_differentiable,
    zeros_float0,
    zeros_like_aval,
)
from lifted._tangents import match_tangents
from lifted._trees import structure


@dataclasses.dataclass(frozen=True)
class Direction:
    """Tangents of the primals and of the variables, as the caller gave them."""

    primals: tuple[Any, ...]
    tangents: tuple[Any, ...]
    variable_tangents: Any

    @classmethod
    def make(cls, name: str, primals: Any, tangents: Any, variable_tangents: Any) -> "Direction":
        """Checks that primals and tangents are sequences of one length.

        Raises:
          TypeError: one of them is no tuple or list.
          ValueError: their lengths differ.
        """
        for argument, value in (("primals", primals), ("tangents", tangents)):
            if not isinstance(value, (tuple, list)):
                raise TypeError(
                    f"{name}: {argument}: expected a tuple or a list with one entry for each "
                    f"argument of fn, got {describe(value)}; for a single argument write "
                    f"({argument[:-1]},)."
                )
        if len(primals) != len(tangents):
            raise ValueError(
                f"{name}: tangents: expected one for each of {len(primals)} primals, got "
                f"{len(tangents)}; give None for a primal that is held."
            )
        return cls(tuple(primals), tuple(tangents), variable_tangents)

    def visible(self, mdl: Any) -> tuple[Filter, ...]:
        """Filters of the variables that have tangents: these are visible whatever the filter of
        variables says."""
        targets, treedef = jax.tree.flatten(mdl, is_leaf=is_target)
        try:
            trees = treedef.flatten_up_to(self.variable_tangents)  # type: ignore[attr-defined]
        except (ValueError, TypeError):  # Told when the tangents are matched.
            return ()
        kinds = map(group_of, targets)
        return tuple(
            kind.visible_for(tree) for kind, tree in zip(kinds, trees, strict=True) if kind
        )

    def match(self, functional: Functional, variables: Variables, partial: bool) -> list[Any]:
        """The tangent of each leaf of ``(variables, primals)``, None for zero."""
        given = functional.structure.as_variables(self.variable_tangents, variables)
        of_variables = match_tangents(variables, given, ("variable_tangents",), partial=partial)
        pairs = enumerate(zip(self.primals, self.tangents, strict=True))
        of_primals = [match_tangents(p, t, ("tangents", i)) for i, (p, t) in pairs]
        return [*of_variables, *(t for leaves in of_primals for t in leaves)]

    def inputs(self, functional: Functional, variables: Variables) -> tuple[Inputs, list[Any]]:
        """The inputs with those leaves active that have a tangent, and these tangents."""
        tangents = self.match(functional, variables, functional.initializing)
        inputs = Inputs.of(variables, self.primals, [t is not None for t in tangents])
        return inputs, [tangents[i] for i in inputs.active]

    def validate(self, functional: Functional) -> Callable[[Variables], None]:
        """A check, for `Call.finish`, that tangents of variables that ``init`` creates match
        them."""

        def validate(variables: Variables) -> None:
            if functional.initializing:
                self.match(functional, variables, False)

        return validate


def jvp(
    fn: Callable[..., Any],
    mdl: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Any,
    variables: Filter = True,
    rngs: Filter = True,
    *,
    has_aux: bool = False,
    return_variable_tangents: bool = False,
) -> tuple[Any, ...]:
    """A function of a module and its Jacobian-vector product; as `jax.jvp`.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a pytree of arrays, or a pair ``(pytree,
        aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      primals: tuple or list of pytrees of arrays.
      tangents: tuple or list of as many tangents, each of the structure, shapes and dtypes of its
        primal.
      variable_tangents: ``{collection: tangents}``, or, where ``mdl`` is a pytree, a pytree of
        these; on NNX modules also an `nnx.State` or a pytree of the module's form. A value in a
        box, such as `nn.Partitioned`, takes a tangent in a box or without one. Anything may be left
        out or None here and in ``tangents``: that is zero, and not differentiated at all. Integers,
        booleans and keys need no tangent.
      variables: filter of the variables that are visible to ``fn`` besides these, and may be
        updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      return_variable_tangents: whether the tangents of the variables that ``fn`` wrote are
        returned.

    Returns:
      ``(y, y_dot)``, where ``y_dot`` has the structure and shapes of ``y``; then ``aux`` with
      ``has_aux``; then, with ``return_variable_tangents``, the tangents of the variables that
      ``fn`` wrote, in the form of the variables.

    Raises:
      TypeError: ``primals`` or ``tangents`` is no sequence; a tangent of another structure or dtype
        than its value, or one other than zero for what cannot be differentiated.
      ValueError: a tangent for an unknown variable, or of another shape; a module is not bound.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> class Wave(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, t):
      ...         return jnp.sin(self.param("frequency", nn.initializers.ones, ()) * t)
      >>> class Residual(nn.Module):  # u'' + u, by forward mode twice
      ...     @nn.compact
      ...     def __call__(self, t):
      ...         u = Wave()
      ...         u_t = lambda mdl, t: lifted.jvp(lambda mdl, t: mdl(t), mdl, (t,), (1.0,), {})[1]
      ...         _, u_tt = lifted.jvp(u_t, u, (t,), (1.0,), {})
      ...         return u_tt + u(t)
      >>> variables = Residual().init(jax.random.key(0), 0.3)
      >>> print(Residual().apply(variables, 0.3))
      0.0

    Source:
    https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/transformations.html
    """
    direction = Direction.make("jvp", primals, tangents, variable_tangents)
    visible = direction.visible(mdl)
    call = Call.make(
        "jvp", fn, mdl, primals, has_aux=has_aux, variables=variables, frozen=visible, rngs=rngs
    )

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        inputs, active = direction.inputs(call.functional, variables)
        pure = call.pure(inputs)

        def with_written(values: list[Any]) -> tuple[Any, Any]:
            y, (aux, updates) = pure(values)
            written = (
                jax.tree.leaves(call.functional.written(updates))
                if return_variable_tangents
                else []
            )
            return (y, [x for x in written if is_differentiable(x)]), (aux, updates)

        (y, _), (y_dot, written_dot), (aux, updates) = jax.jvp(
            with_written, (inputs.values,), (active,), has_aux=True
        )
        result = (y, y_dot, aux) if has_aux else (y, y_dot)
        if return_variable_tangents:
            written, dots = call.functional.written(updates), iter(written_dot)
            leaves = [
                next(dots) if is_differentiable(x) else zeros_float0(np.shape(x))
                for x in jax.tree.leaves(written)
            ]
            result = (*result, structure(written).unflatten(leaves))
        return result, updates

    return call.finish(attempt, visible, direction.validate(call.functional))


def linearize(
    fn: Callable[..., Any],
    mdl: Any,
    *primals: Any,
    has_aux: bool = False,
    variables: Filter = True,
    rngs: Filter = True,
    grad_variables: Filter = False,
) -> tuple[Any, ...]:
    """A function of a module and its linear approximation; as `jax.linearize`.

    Use it instead of `jvp` where many tangents are pushed through at one point: ``fn`` is run once.

    Args:
      fn: function ``fn(mdl, *primals)`` that returns a pytree of arrays, or a pair ``(pytree,
        aux)``.
      mdl: a bound Linen module, a `flax.core.Scope`, an NNX module, or a pytree of these.
      *primals: pytrees of arrays.
      has_aux: whether ``fn`` returns a pair, of which the second element is returned as it is.
      variables: filter of the variables that are visible to ``fn`` and may be updated by it.
      rngs: filter of the RNG streams that are visible to ``fn``.
      grad_variables: filter of the variables that the approximation is a function of, as of
        `value_and_grad`.

    Returns:
      ``(y, f_jvp)``, or ``(y, f_jvp, aux)`` with ``has_aux``. ``f_jvp(*tangents)``, or
      ``f_jvp(variable_tangents, *tangents)`` with ``grad_variables``, returns the tangent of ``y``;
      tangents may be left out as in `jvp`. It is a pytree and may leave `jax.jit`.

    Raises: as `jvp`.

    Example:
      >>> import jax, jax.numpy as jnp, lifted
      >>> from flax import linen as nn
      >>> dense = nn.Dense(2, kernel_init=nn.initializers.ones)
      >>> x = jnp.arange(3.0)
      >>> bound = dense.bind(dense.init(jax.random.key(0), x))
      >>> y, f_jvp = lifted.linearize(lambda mdl, x: mdl(x), bound, x, grad_variables="params")
      >>> f_jvp({"params": {"bias": jnp.ones(2)}}, None).tolist()
      [1.0, 1.0]

    Source: https://docs.jax.dev/en/latest/_autosummary/jax.linearize.html
    """
    call = Call.make(
        "linearize",
        fn,
        mdl,
        primals,
        has_aux=has_aux,
        variables=variables,
        frozen=grad_variables,
        rngs=rngs,
    )
    selection = Selection.make("linearize", grad_variables, None, primals)

    def attempt(variables: Variables) -> tuple[Any, Updates]:
        inputs = selection.inputs(call.functional, variables, call.primals)
        y, tangent_map, (aux, updates) = jax.linearize(
            call.pure(inputs), inputs.values, has_aux=True
        )
        layout = selection.layout(call.functional, inputs)
        structure = None if selection.variables is None else call.functional.structure
        f_jvp = jax.tree_util.Partial(_Pushforward(layout, structure), tangent_map)
        return ((y, f_jvp, aux) if has_aux else (y, f_jvp)), updates

    validate = check_selects(call, grad_variables, "grad_variables")
    return call.finish(attempt, selection.filter, validate)


@dataclasses.dataclass(frozen=True)
class _Pushforward:
    """The static part of what `linearize` returns: the form of the tangents."""

    layout: Layout
    structure: Structure | None

    def __call__(self, tangent_map: Callable[..., Any], *tangents: Any) -> Any:
        values = self.layout.treedef.unflatten(self.layout.avals)
        if len(tangents) != len(values):
            form = "variable_tangents, *tangents" if self.structure else "*tangents"
            raise TypeError(
                f"f_jvp({form}): expected {len(values)} arguments, got {len(tangents)}; None means "
                "zero."
            )
        given = list(tangents)
        paths: list[Any] = [("tangents", i) for i in range(len(given))]
        if self.structure is not None:
            given[0] = self.structure.as_variables(given[0], values[0])
            paths = [("variable_tangents",), *paths[:-1]]
        matched = [
            t for v, g, p in zip(values, given, paths, strict=True) for t in match_tangents(v, g, p)
        ]
        active = {
            k: (t, aval)
            for k, t, aval in zip(self.layout.sources, matched, self.layout.avals, strict=True)
        }
        active.pop(None, None)
        return tangent_map(
            [zeros_like_aval(a) if t is None else t for _, (t, a) in sorted(active.items())]
        )
