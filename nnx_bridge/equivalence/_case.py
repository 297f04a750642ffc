"""What is compared: a module, one call of it, and, where there is one, its rewrite."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter

from nnx_bridge._collections import Variables
from nnx_bridge.equivalence._correspondence import Correspondence, Renaming
from nnx_bridge.equivalence._inputs import is_random
from nnx_bridge.host import Host, Method, check_linen_module, unhost
from nnx_bridge.host._checks import check_method
from nnx_bridge.weights import Plan

_ACCEPTED = (
    "a Case, or a tuple (module, args), (module, args, kwargs), (reference, model, args) or "
    "(reference, model, args, kwargs)"
)


class CaseError(ValueError):
    """A case cannot be loaded, or its module does not run; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A module and one call of it; and a model that should compute the same.

    Arrays among the arguments are inputs; those of floating point or complex dtype are
    differentiated. `Random` and `jax.ShapeDtypeStruct` among them are drawn for each seed.
    Everything else (`deterministic=False`, `None`) is passed as it is.

    Args:
      module: The Linen module, not bound; with a `model` it may be an NNX module too.
      args: Positional arguments of the call.
      kwargs: Keyword arguments of the call.
      model: The model to compare it with, of NNX (a rewrite, a host) or of Linen. Without one, the
        module is compared with itself under `lifted`, and hosted as NNX.
      correspondence: Which path of the module stands for which of the model, where they have other
        names: a dict of prefixes (`{"Dense_0": "first"}`), a function from path to path, the `Plan`
        by which the model was loaded, or a `Correspondence`.
      variables: The module's variables. By default `module.init` makes them from the seed, with the
        arguments of the call.
      check_values: Whether the model must hold the values of `variables` itself. By default it must
        where they are given. It is run with them in any case.
      randomize: Whether parameters and statistics get noise, the same in both models. Biases that
        are zero hide faults.
      rngs: Names of the streams that get keys from the seed, or the keys themselves.
      mutable: The collections that the call may change; by default every one that the module has
        but `params`, `perturbations` and `intermediates`.
      method: The module's method, as for `module.apply`.
      name: What reports call it; by default the class of the module.

    Raises:
      CaseError: `module` or `model` is no module, or `args` is no tuple.

    Example:
        >>> case = Case(nn.Dense(3), (np.ones((2, 4), np.float32),))
        >>> case.name
        'Dense'
    """

    module: nn.Module | nnx.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    model: nn.Module | nnx.Module | None = None
    correspondence: Renaming | Correspondence | Plan = None
    variables: Variables | None = None
    check_values: bool | None = None
    randomize: bool = True
    rngs: Mapping[str, jax.Array] | Sequence[str] = ("params", "dropout")
    mutable: CollectionFilter | None = None
    method: Method = None
    name: str = ""

    def __post_init__(self) -> None:
        try:
            if self.model is None or not isinstance(self.module, nnx.Module):
                check_linen_module(self.module)
            if self.model is not None and not isinstance(self.model, nnx.Module):
                check_linen_module(self.model)
        except TypeError as error:
            raise CaseError(f"the module of a case: {error}") from error
        for module in (m for m in (self.module, self.model) if m is not None):
            try:
                check_method(unhost(module)[0] if isinstance(module, Host) else module, self.method)
            except AttributeError as error:
                raise CaseError(f"the method of a case: {error}") from error
        if not isinstance(self.args, tuple | list):
            raise CaseError(
                f"the arguments of a case must be a tuple, got {type(self.args).__name__}; one "
                "argument x is written (x,)"
            )
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "name", self.name or _name(self.module))

    def keys(self, seed: int) -> dict[str, jax.Array]:
        """The keys of the streams: those given, or new ones from the seed."""
        if isinstance(self.rngs, Mapping):
            return dict(self.rngs)
        keys = jax.random.split(jax.random.key(seed), len(self.rngs))
        return dict(zip(self.rngs, keys, strict=True))


def _name(module: Any) -> str:
    return type(unhost(module)[0] if isinstance(module, Host) else module).__name__


def load_case(target: str) -> Case:
    """The case that a factory makes.

    Args:
      target: `package.module:factory`, a function without arguments. It returns a `Case`, or a
        tuple `(module, args)` or `(reference, model, args)`, with `kwargs` at the end where there
        are some. A single array stands for `args` of one.

    Returns:
      The case.

    Raises:
      CaseError: The path cannot be imported, or the factory returns something else.

    Example:
        >>> load_case("examples.small_model:mlp").name
        'MLP'
    """
    factory = _import(target)
    if isinstance(factory, Case):
        return factory
    if not callable(factory):
        raise CaseError(f"{target} is no function, but of type {type(factory).__name__}")
    try:
        made = factory()
    except Exception as error:
        raise CaseError(f"{target}() raised {type(error).__name__}: {error}") from error
    if isinstance(made, Case):
        return made
    if isinstance(made, nn.Module | nnx.Module):
        raise CaseError(f"{target}() returned a module without inputs; expected {_ACCEPTED}")
    parts = list(made) if isinstance(made, tuple) else []
    models = [parts.pop(0)] if parts else []
    if parts and isinstance(parts[0], nn.Module | nnx.Module):
        models.append(parts.pop(0))
    if len(parts) not in (1, 2):
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise CaseError(f"{target}() returned {found}; expected {_ACCEPTED}")
    args, *rest = parts
    if isinstance(args, jax.Array | np.ndarray) or is_random(args):
        args = (args,)
    return Case(models[0], args, *rest, model=models[1] if len(models) > 1 else None)


def _import(target: str) -> Any:
    path, colon, name = target.partition(":")
    if not (path and colon and name):
        raise CaseError(f"{target!r} is no import path; expected package.module:factory")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        # A module that is there but fails to import says so itself, whatever it misses.
        missing = isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
        reason = "was not found" if missing else f"raised {type(error).__name__}: {error}"
        raise CaseError(f"importing {path!r} of {target!r}: the module {reason}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {path}:{near[0]}?" if near else ""
        raise CaseError(f"{path!r} has no attribute {name!r}{hint}") from None
