"""A Linen module as a tree of NNX modules that mirrors its variables.

The tree holds what Linen calls variables: `model.Dense_0.kernel` is an `nnx.Param`. The program
stays Linen's: a call gathers the variables, runs `module.apply`, and writes what it changed back
into the tree. So every Linen model works, and the numbers are those of Linen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, in_filter, union_filters

from nnx_bridge._collections import Variables
from nnx_bridge.host._captures import called_modules, deposit, recorded
from nnx_bridge.host._tree import Node, fill, node_at, read, write

Keys: TypeAlias = jax.Array | dict[str, jax.Array]
Method: TypeAlias = str | Callable[..., Any] | None

# What a call with the default filter leaves alone: what optimizers and users change, and what is
# recorded only on request.
_NOT_STATISTICS = ("params", "perturbations", "intermediates")


class Host(Node):
    """Runs a Linen module, with its variables as a tree of NNX modules and Variables.

    It is an `nnx.Module`: `nnx.split`, `nnx.state`, `nnx.jit`, `nnx.grad`, `nnx.Optimizer` and
    the transforms of `lifted` take it. Fields of the Linen module are read, and its methods called,
    as on the module itself (`model.features`, `model.encode(x)`), unless a variable, a submodule or
    an attribute of `nnx.Module` has that name; then a method is called by
    `model(x, method='encode')`.

    Args:
      module: The Linen module, not bound. Its program is what is run.
      variables: Its variables, as `module.init` returns them; boxed (`nn.Partitioned`) or not. No
        mesh is needed for boxed ones.
      rngs: The streams that calls take their keys from: `nnx.Rngs` (shared, not forked), or a key
        for each stream. The n-th call, counted from 0, equals `module.apply(..., rngs={name:
        jax.random.fold_in(key, n)})`. The stream `default` serves as Linen's `params`, to which
        Linen falls back.
      mutable: The collections that a call may change, as for `module.apply`. By default, every one
        the model has but `params`, `perturbations` and `intermediates`, so statistics and caches
        update by themselves.

    Raises:
      TypeError: `module` is no Linen module, or `variables` are not nested by collection.

    Example:
        >>> import jax.numpy as jnp
        >>> module, x = nn.Dense(3), jnp.ones((2, 4))
        >>> model = Host(module, module.init(jax.random.key(0), x))
        >>> model.kernel.shape, model(x).shape
        ((4, 3), (2, 3))
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        *,
        rngs: nnx.Rngs | Mapping[str, jax.Array] | None = None,
        mutable: CollectionFilter | None = None,
    ) -> None:
        self._linen = _Program(check_linen_module(module), mutable)
        self._linen_rngs = rngs if rngs is None or isinstance(rngs, nnx.Rngs) else nnx.Rngs(**rngs)
        fill(self, variables)

    @classmethod
    def init(
        cls,
        module: nn.Module,
        rngs: Keys | nnx.Rngs,
        *args: Any,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        **kwargs: Any,
    ) -> Host:
        """A host with new variables, the numbers those of `module.init(rngs, *args, **kwargs)`.

        Args:
          module: The Linen module.
          rngs: What `module.init` takes: a key, or a key for each stream. The host's own streams
            start from the same keys. Or `nnx.Rngs`, which give the keys and are the streams.
          *args: Sample inputs.
          method: The method to run, as for `module.init`.
          mutable: See `Host`.
          **kwargs: Sample inputs by keyword.

        Raises:
          TypeError: `module` is no Linen module.

        Example:
            >>> x = jax.numpy.ones((2, 4))
            >>> Host.init(nn.Dense(3), jax.random.key(0), x).bias.shape
            (3,)
        """
        keys = _draw(rngs) if isinstance(rngs, nnx.Rngs) else rngs
        with called_modules() as paths:
            variables = check_linen_module(module).init(keys, *args, method=method, **kwargs)
        streams = rngs if isinstance(rngs, nnx.Rngs | Mapping) else {"params": rngs}
        host = cls(module, variables, rngs=streams, mutable=mutable)
        for path in paths:
            node_at(host, path)
        return host

    def __call__(
        self,
        *args: Any,
        rngs: Keys | nnx.Rngs | None = None,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the Linen module and keeps what it changed.

        Args:
          *args: Arguments of the Linen method.
          rngs: Keys for this call alone, as for `module.apply`, or `nnx.Rngs` to draw them from.
          method: The Linen method, as for `module.apply`.
          mutable: The collections that this call may change; `False` for none. What is sown into
            `intermediates` is that of the last call that was allowed to.
          **kwargs: Further arguments of the Linen method.

        Returns:
          What the Linen method returns. Changed variables are in the model, not in the result.
        """
        if rngs is None:
            rngs = self._linen_rngs
        captured = recorded(self)
        variables = read(self)
        # Sown values are a record of one call, so they are no input of the next.
        variables.pop("intermediates", None)
        changeable = self._linen.mutable_collections(mutable, variables)
        variables = {**{c: v for c, v in variables.items() if c not in captured}, **captured}
        with called_modules(bool(captured)) as paths:
            result = self._linen.module.apply(
                variables,
                *args,
                rngs=_draw(rngs) if isinstance(rngs, nnx.Rngs) else rngs,
                method=method,
                mutable=union_filters(changeable, list(captured)) if captured else changeable,
                **kwargs,
            )
        if changeable is False and not captured:
            return result
        output, updates = result
        deposit(self, {c: updates.pop(c) for c in captured if c in updates}, paths)
        if in_filter(changeable, "intermediates") and "intermediates" not in captured:
            updates = {"intermediates": {}, **updates}
        write(self, updates)
        return output

    def __getattr__(self, name: str) -> Any:
        # Only for what is neither a variable, a submodule nor an attribute of nnx.Module.
        program = None if name.startswith("__") else vars(self).get("_linen")
        if program is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}", name=name, obj=self)
        if name in program.fields:
            return getattr(program.module, name)
        if callable(method := getattr(type(program.module), name, None)):
            return functools.partial(self, method=method)
        raise AttributeError(
            f"the hosted {program!r} has no variable, submodule, field or method {name!r}",
            name=name,
            obj=self,
        )


def unhost(model: Host) -> tuple[nn.Module, dict[str, Any]]:
    """The Linen module of a host and its variables as they are now: the inverse of `Host`.

    Example:
        >>> x = jax.numpy.ones((2, 4))
        >>> module, variables = unhost(Host.init(nn.Dense(3), jax.random.key(0), x))
        >>> module.apply(variables, x).shape
        (2, 3)
    """
    return model._linen.module, read(model)


def default_mutable(variables: Variables) -> CollectionFilter:
    """The collections that a call of a host may change where nobody said which."""
    return [name for name in variables if name not in _NOT_STATISTICS] or False


def check_linen_module(module: Any) -> nn.Module:
    """The module, if it is an instance of a Linen module class.

    Raises:
      TypeError: It is not.
    """
    if isinstance(module, nn.Module):
        return module
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise TypeError(
            f"expected an instance of a Linen module, got the class {module.__name__}; write "
            f"{module.__name__}(...)"
        )
    found = "an NNX module" if isinstance(module, nnx.Module) else "no Linen module"
    raise TypeError(
        f"expected an instance of flax.linen.Module, got {type(module).__name__}, which is {found}"
    )


class _Program:
    """What is static in a host: equal programs need one compilation only."""

    def __init__(self, module: nn.Module, mutable: CollectionFilter | None) -> None:
        self.module = module
        self.fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
        self._mutable = mutable

    def mutable_collections(
        self, override: CollectionFilter | None, variables: Variables
    ) -> CollectionFilter:
        chosen = self._mutable if override is None else override
        return default_mutable(variables) if chosen is None else chosen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Program):
            return NotImplemented
        if self.module is other.module:
            return self._mutable == other._mutable
        # A module that cannot be hashed (it may hold arrays) cannot be compared safely either.
        return hash(self) == hash(other) and (self.module, self._mutable) == (
            other.module,
            other._mutable,
        )

    def __hash__(self) -> int:
        try:
            return hash(self.module)
        except TypeError:
            return id(self.module)

    def __repr__(self) -> str:
        return type(self.module).__name__


def _draw(rngs: nnx.Rngs) -> dict[str, jax.Array]:
    # Not by `rngs.items()`: `nnx.tabulate` compiles every public method, and it is a generator.
    keys = {name: rngs[name]() for name in rngs}
    if "default" in keys:
        keys.setdefault("params", keys.pop("default"))
    return keys
