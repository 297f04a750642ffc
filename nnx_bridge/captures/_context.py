"""A capture context that is that of `nnx.capture`, and safe."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

import lifted
from nnx_bridge.captures._method_outputs import is_method
from nnx_bridge.captures._recording import Recording, record


def capture(
    fn: Any,
    *var_types: type[nnx.Variable[Any]],
    init: nnx.State | None = None,
    method_outputs: type[nnx.Variable[Any]] | None = None,
) -> Callable[..., Any]:
    """Wraps a function so that it returns what its module sows and perturbs; as `nnx.capture`.

    Use it wherever `nnx.capture` stands. It runs on a copy of the module and writes back what
    changed, so that no mark is left on the module, whatever happens inside.

    Args:
      fn: a module, a bound method of one, or a function whose first argument is one. Where it is a
        Variable type, a decorator is returned, as by `nnx.capture`.
      *var_types: types of the Variables to record, each of them exactly, not its subclasses.
      init: what recorded Variables start with, such as perturbations; pytrees are welcome.
      method_outputs: type by which the output of every public method is sown, of inherited ones
        too.

    Returns:
      A function that returns ``(result, *states)``, with an `nnx.State` for each of ``var_types``,
      or ``result`` where there are none.

    Raises:
      TypeError: the first argument of the function is no module.

    Example:
      >>> import jax.numpy as jnp, nnx_bridge
      >>> from flax import nnx
      >>> class Doubled(nnx.Module):
      ...     def __call__(self, x):
      ...         self.sow(nnx.Intermediate, "x", x)
      ...         return self.perturb("twice", 2 * x)
      >>> y, sown, zeros = nnx_bridge.capture(Doubled(), nnx.Intermediate, nnx.Perturbation)(3.0)
      >>> sown["x"].get_value(), float(zeros["twice"].get_value())
      ((3.0,), 0.0)

    Source: https://flax.readthedocs.io/en/latest/guides/extracting_intermediates.html
    """
    if isinstance(fn, type) and issubclass(fn, nnx.Variable):
        types = (fn, *var_types)
        return lambda fn: capture(fn, *types, init=init, method_outputs=method_outputs)
    kinds = var_types
    if method_outputs is not None:
        kinds = (method_outputs, *(kind for kind in var_types if kind is not method_outputs))
    outputs = None if method_outputs is None else is_method
    recording = Recording(kinds, None if init is None else [init], outputs)

    def captured(*args: Any, **kwargs: Any) -> Any:
        module, call = _bound(fn, args, kwargs)
        functional = lifted.functionalize(module)
        (y, recorded), updates = functional(
            functional.variables, lambda mdl: record(call, mdl, recording)
        )
        functional.publish(updates)
        states = [recorded[kinds.index(kind)] for kind in var_types]
        return (y, *states) if states else y

    return captured


def _bound(fn: Any, args: Sequence[Any], kwargs: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The module of a call, and the call as a function of it."""
    if isinstance(fn, nnx.Module):
        return fn, lambda mdl: mdl(*args, **kwargs)
    if inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Module):
        return fn.__self__, lambda mdl: fn.__func__(mdl, *args, **kwargs)
    if not args or not isinstance(args[0], nnx.Module):
        got = type(args[0]).__name__ if args else "no argument"
        raise TypeError(
            f"capture: the first argument of the function must be an nnx.Module, got {got}. "
            "Capture the module itself, or a function whose first argument it is."
        )
    return args[0], lambda mdl: fn(mdl, *args[1:], **kwargs)
