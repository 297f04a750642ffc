"""What `flaxlift check` is asked to check: a Linen module and one call of it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core.scope import CollectionFilter

from nnx_bridge._collections import Variables
from nnx_bridge.host._host import Method, check_linen_module

_ACCEPTED = "a Case, or a tuple (module, args) or (module, args, kwargs)"


class CaseError(ValueError):
    """A case cannot be loaded, or its module does not run; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A Linen module and one call of it.

    Arrays among the arguments are inputs; those of floating point or complex dtype are
    differentiated. Everything else (`deterministic=False`, `None`) is passed as it is.

    Args:
      module: The Linen module, not bound.
      args: Positional arguments of the call.
      kwargs: Keyword arguments of the call.
      variables: The module's variables. By default `module.init` makes them from the seed, with the
        arguments of the call.
      rngs: Names of the streams that get keys from the seed, or the keys themselves.
      mutable: The collections that the call may change; by default every one that the module has
        but `params`, `perturbations` and `intermediates`.
      method: The module's method, as for `module.apply`.
      name: What reports call it; by default the class of the module.

    Raises:
      CaseError: `module` is no Linen module, or `args` is no tuple.

    Example:
        >>> case = Case(nn.Dense(3), (np.ones((2, 4), np.float32),))
        >>> case.name
        'Dense'
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    variables: Variables | None = None
    rngs: Mapping[str, jax.Array] | Sequence[str] = ("params", "dropout")
    mutable: CollectionFilter | None = None
    method: Method = None
    name: str = ""

    def __post_init__(self) -> None:
        try:
            check_linen_module(self.module)
        except TypeError as error:
            raise CaseError(f"the module of a case: {error}") from error
        if not isinstance(self.args, tuple | list):
            raise CaseError(
                f"the arguments of a case must be a tuple, got {type(self.args).__name__}; one "
                "argument x is written (x,)"
            )
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "name", self.name or type(self.module).__name__)

    def keys(self, seed: int) -> dict[str, jax.Array]:
        """The keys of the streams: those given, or new ones from the seed."""
        if isinstance(self.rngs, Mapping):
            return dict(self.rngs)
        keys = jax.random.split(jax.random.key(seed), len(self.rngs))
        return dict(zip(self.rngs, keys, strict=True))


def load_case(target: str) -> Case:
    """The case that a factory makes.

    Args:
      target: `package.module:factory`, a function without arguments. It returns a `Case`, or a
        tuple `(module, args)` or `(module, args, kwargs)`, where a single array stands for `args`
        of one.

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
    if isinstance(made, nn.Module):
        raise CaseError(f"{target}() returned a module without inputs; expected {_ACCEPTED}")
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise CaseError(f"{target}() returned {found}; expected {_ACCEPTED}")
    module, args, *rest = made
    if isinstance(args, jax.Array | np.ndarray):
        args = (args,)
    return Case(module, args, *rest)


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
