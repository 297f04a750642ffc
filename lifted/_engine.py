"""What the transforms share: the checks of a call, the pure function that is differentiated, and
the publishing.

A transform makes a `Call`, gives the pure function of `Call.pure` to a raw JAX transform, and
returns through `Call.finish`, which writes the updates to the target.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifted._closures import watched
from lifted._errors import describe, dtype_of, is_array, path_text, suggestion
from lifted._functional import Functional, functionalize
from lifted._group import Filter, Updates, Variables, is_target, is_value, leaves
from lifted._inputs import Inputs
from lifted._trees import structure

Attempt = Callable[[Variables], tuple[Any, Updates]]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a transform, checked."""

    name: str
    fn: Callable[..., Any]
    functional: Functional
    primals: tuple[Any, ...]
    has_aux: bool

    @classmethod
    def make(
        cls,
        name: str,
        fn: Callable[..., Any],
        mdl: Any,
        primals: Sequence[Any],
        *,
        has_aux: bool = False,
        variables: Filter = True,
        frozen: Filter = False,
        rngs: Filter = True,
    ) -> "Call":
        """Checks the arguments that all transforms share, and functionalises ``mdl``.

        Raises:
          TypeError: ``fn`` is not callable, or a module or a module class; a module is among the
            primals.
        """
        functional = functionalize(mdl, variables=variables, frozen=frozen, rngs=rngs)
        fn = unbound(name, fn, mdl)
        for i, primal in enumerate(primals):
            if any(map(is_target, leaves(primal))):
                raise TypeError(
                    f"{name}: primal {i} holds a module, a scope or a Variable. Put it into mdl, "
                    f"which may be a pytree: lifted.{name}(fn, (mdl, other), ...) calls "
                    "fn((mdl, other), ...)."
                )
        return cls(name, fn, functional, tuple(primals), has_aux)

    def pure(
        self, inputs: Inputs, check: Callable[[Any], None] | None = None
    ) -> Callable[..., Any]:
        """The function of the differentiated leaves that returns ``(y, (aux, updates))``.

        Args:
          inputs: which leaves are differentiated, and the values of the others.
          check: called with the result of ``fn``; raises where the transform cannot take it.
        """
        check = check or check_arrays(self.name)

        def pure(values: Sequence[Any]) -> tuple[Any, tuple[Any, Updates]]:
            variables, primals = inputs.merge(values)
            held = self.functional.variables, self.primals
            with watched(self.name, self.functional, (values, inputs.leaves), held):
                out, updates = self.functional(variables, self.fn, *primals)
            y, aux = split_aux(self.name, out, self.has_aux)
            check(y)
            return y, (aux, updates)

        return pure

    def finish(
        self,
        attempt: Attempt,
        selected: Filter,
        validate: Callable[[Variables], None],
    ) -> Any:
        """The result of ``attempt``, with its updates published.

        Inside Linen's ``init`` the variables that are to be differentiated may not exist before
        ``fn`` has run. Then the transform runs again with those that the first run created. What is
        published is from the first run.

        Args:
          attempt: runs the transform with the given variables; returns its result and the updates.
          selected: filter of the variables that are differentiated.
          validate: raises where the variables, all of which exist by now, are not what the caller's
            arguments say.
        """
        functional = self.functional
        if not functional.initializing:
            validate(functional.variables)
        result, updates = attempt(functional.variables)
        if functional.initializing:
            complete = functional.extend(functional.variables, updates, True)
            validate(functional.variables if complete is None else complete)
            extended = functional.extend(functional.variables, updates, selected)
            if extended is not None:
                result, _ = attempt(extended)
        functional.publish(updates)
        return result


def split_aux(name: str, out: Any, has_aux: bool) -> tuple[Any, Any]:
    """The output of ``fn`` and its ``aux``, None without one.

    Raises:
      TypeError: ``fn`` returned a module, or no pair though ``has_aux`` says so.
    """
    if any(is_target(x) and not is_value(x) for x in leaves(out)):
        raise TypeError(
            f"{name}: fn returned a module or a scope; return the arrays that are wanted of it."
        )
    if not has_aux:
        return out, None
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        got = f"{len(out)} values" if isinstance(out, (tuple, list)) else describe(out)
        raise TypeError(
            f"{name}: with has_aux=True fn must return a pair (output, aux), got {got}."
        )
    y, aux = out
    return y, aux


# What each kind of dtype is called, and what to do about another one.
_KINDS: dict[Any, tuple[str, str]] = {
    np.complexfloating: ("complex", "leave out holomorphic, or convert it"),
    np.floating: ("real", "for a holomorphic function pass holomorphic=True"),
    np.inexact: ("real or complex", "convert it"),
}


def check_arrays(name: str, kind: Any = np.generic) -> Callable[[Any], None]:
    """A check that the output of ``fn`` is a pytree of arrays of a dtype of ``kind``."""

    def check(y: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(y):
            if not is_array(leaf):
                raise TypeError(
                    f"{name}: fn must return arrays, got {describe(leaf)} at "
                    f"output{jax.tree_util.keystr(path)}. Return it as aux, with has_aux=True."
                )
            if kind is not np.generic and not jnp.issubdtype(dtype_of(leaf), kind):
                expected, remedy = _KINDS[kind]
                raise TypeError(
                    f"{name}: fn must return {expected} arrays, got {describe(leaf)} at "
                    f"output{jax.tree_util.keystr(path)}; {remedy}, or return it as aux."
                )

    return check


def check_inputs(name: str, inputs: Inputs, kind: Any) -> None:
    """Checks that the differentiated leaves have a dtype of ``kind``.

    Raises:
      TypeError: one of them has another dtype.
    """
    expected, remedy = _KINDS[kind]
    for path, leaf in inputs.active_paths():
        if not jnp.issubdtype(dtype_of(leaf), kind):
            raise TypeError(
                f"{name}: {path_text(path)}: expected a {expected} input, got {describe(leaf)}; "
                f"{remedy}, or select other inputs."
            )


def check_scalar(name: str, holomorphic: bool) -> Callable[[Any], None]:
    """A check that the output of ``fn`` is a scalar that has a gradient."""

    def check(y: Any) -> None:
        if structure(y) != structure(0):
            raise TypeError(
                f"{name}: fn must return a scalar, got {structure(y)}. For a pair (output, aux) "
                "pass has_aux=True; for outputs that are not scalar use lifted.vjp or "
                "lifted.jacrev."
            )
        kind = "complex" if holomorphic else "real"
        if not is_array(y):
            raise TypeError(f"{name}: fn must return a {kind} scalar, got {describe(y)}.")
        if np.shape(y) != ():
            raise ValueError(
                f"{name}: fn must return a scalar, got {describe(y)}. Reduce it, for example with "
                ".sum(), or use lifted.vjp or lifted.jacrev."
            )
        dtype = dtype_of(y)
        if not jnp.issubdtype(dtype, np.complexfloating if holomorphic else np.floating):
            is_complex = jnp.issubdtype(dtype, np.complexfloating)
            remedy = " For a holomorphic function pass holomorphic=True." if is_complex else ""
            raise TypeError(f"{name}: fn must return a {kind} scalar, got {describe(y)}.{remedy}")

    return check


def check_selects(call: Call, selected: Filter, argument: str) -> Callable[[Variables], None]:
    """A check that a filter of variables to differentiate selects any.

    A model without parameters has an empty gradient with respect to ``'params'``.
    """

    def check(variables: Variables) -> None:
        if isinstance(selected, bool) or selected == "params":
            return
        if not any(jax.tree.leaves(call.functional.match(variables, selected))):
            name = getattr(selected, "__name__", selected)
            raise ValueError(
                f"{call.name}: {argument}={selected!r} selects no variable of mdl; "
                f"{suggestion(name, call.functional.names(variables))}."
            )

    return check


def unbound(name: str, fn: Any, mdl: Any) -> Callable[..., Any]:
    """``fn`` as a function whose first argument is the target."""
    if isinstance(fn, type):
        raise TypeError(
            f"{name}: fn is the class {fn.__name__}; pass a function of an instance and the "
            "primals, such as lambda mdl, x: mdl(x), and the instance as mdl."
        )
    if is_target(fn):
        raise TypeError(
            f"{name}: fn is a module; pass a function of it, such as lambda mdl, x: mdl(x)."
        )
    if not callable(fn):
        raise TypeError(f"{name}: fn must be callable, got {describe(fn)}.")
    # A method of the target, not one of another module that is given the target.
    if inspect.ismethod(fn) and is_target(mdl) and type(fn.__self__) is type(mdl):
        return fn.__func__
    return fn
