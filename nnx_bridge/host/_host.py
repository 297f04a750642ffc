"""A Linen module as a tree of NNX modules that mirrors its submodules.

The tree holds what Linen calls variables: `model.Dense_0.kernel` is an `nnx.Param`. The program
stays Linen's: a call gathers the variables, runs `module.apply`, and writes what it changed back
into the tree. So every Linen model works, and the numbers are those of Linen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core.scope import CollectionFilter, DenyList
from flax.errors import FlaxError

from lifted._errors import describe, path_text
from nnx_bridge._collections import Variables
from nnx_bridge.host._checks import abstractly, differences, explain, not_finite
from nnx_bridge.host._interventions import Method, marked
from nnx_bridge.host._keys import Keys, draw
from nnx_bridge.host._layout import Layout
from nnx_bridge.host._node import Node
from nnx_bridge.host._node_type import node_type
from nnx_bridge.host._program import Place, Program, default_mutable
from nnx_bridge.host._tree import contents, fill, node_at, put, slots

__all__ = [
    "Host",
    "Keys",
    "Method",
    "check_linen_module",
    "check_variables",
    "default_mutable",
]


class Host(Node):  # type: ignore[metaclass]  # Flax does not export that of nnx.Module.
    """Runs a Linen module, with its variables as a tree of NNX modules and Variables.

    It is an `nnx.Module`: `nnx.split`, `nnx.state`, `nnx.jit`, `nnx.grad`, `nnx.Optimizer` and
    the transforms of `lifted` take it. Every submodule is a `Node`, which shows its Linen class and
    its fields and is called like it (`model.encoder(x)`, `model.encode(x)`), and which an NNX
    module may replace (`model.encoder = MyEncoder(...)`).

    Args:
      module: The Linen module, not bound. Its program is what is run.
      variables: Its variables, as `module.init` returns them; boxed (`nn.Partitioned`) or not. No
        mesh is needed for boxed ones.
      *args: Sample inputs; `jax.ShapeDtypeStruct` will do, since nothing is computed. They tell
        which modules a `compact` method makes. Without them the variables are at their places all
        the same, and submodules can be replaced, but only what `setup` makes can be called by
        itself and shows its fields, until the model has been called; a submodule of a `compact`
        method that has no variables (`Dropout`) has no node.
      rngs: The streams that calls take their keys from: `nnx.Rngs` (shared, not forked), a key for
        each stream, or one key, which is that of the stream `params`. The n-th call, counted from
        0, equals `module.apply(..., rngs={name: jax.random.fold_in(key, n)})`. The stream `default`
        serves as Linen's `params`, to which Linen falls back.
      method: The method that the sample inputs are for.
      mutable: The collections that a call may change, as for `module.apply`. By default, every one
        the model has but `params`, `perturbations` and `intermediates`, so statistics and caches
        update by themselves.
      training: Which arguments or fields `train()` and `eval()` set, with their values in training:
        `{"deterministic": False}`. By default they are found by their names; see
        `Node.training_arguments`. What is no mapping is the argument `training` of the module.
      **kwargs: Sample inputs by keyword.

    Raises:
      TypeError: `module` is no Linen module, or `variables` are not nested by collection.
      flax.errors.FlaxError: `variables` do not fit the sample inputs; the message says which.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> module, x = nn.Dense(3), jnp.ones((2, 4))
        >>> model = Host(module, module.init(jax.random.key(0), x))
        >>> model.kernel.shape, model.features, model(x).shape
        ((4, 3), 3, (2, 3))
    """

    def __new__(cls, module: nn.Module | None = None, *args: Any, **kwargs: Any) -> Host:
        """An instance of the subclass that is called like the Linen class."""
        if cls._base is None:
            return object.__new__(node_type(type(check_linen_module(module)), cls))
        return object.__new__(cls)  # A copy.

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        *args: Any,
        rngs: Keys | nnx.Rngs | None = None,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        training: Mapping[str, bool] | Any = None,
        _layout: Layout | None = None,
        **kwargs: Any,
    ) -> None:
        check_linen_module(module)
        training, kwargs = _mode_or_argument(training, kwargs)
        if not isinstance(variables, Mapping):
            raise TypeError(
                "variables must be nested dicts by collection, as module.init returns them; got "
                f"{describe(variables)}"
            )
        layout = _layout
        if layout is None and (args or kwargs):
            layout = _layout_of_call(module, variables, args, kwargs, method, mutable)
        layout = layout or Layout.of_setup(module, variables)
        put(self, "_linen", Place(Program(module, mutable, training, layout), ()))
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            rngs = nnx.Rngs(**(rngs if isinstance(rngs, Mapping) else {"params": rngs}))
        put(self, "_linen_rngs", rngs)
        for path in sorted(layout.submodules, key=len):
            node_at(self, path)
        fill(self, variables)

    @classmethod
    def init(
        cls,
        module: nn.Module,
        rngs: Keys | nnx.Rngs,
        *args: Any,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        training: Mapping[str, bool] | Any = None,
        **kwargs: Any,
    ) -> Host:
        """A host with new variables, the numbers those of `module.init(rngs, *args, **kwargs)`.

        Under `nnx.eval_shape` the variables are abstract; under `nnx.jit` they are made where
        their shardings say.

        Args:
          module: The Linen module.
          rngs: What `module.init` takes: a key, or a key for each stream. The host's own streams
            start from the same keys. Or `nnx.Rngs`, which give the keys and are the streams.
          *args: Sample inputs.
          method: The method to run, as for `module.init`.
          mutable: See `Host`.
          training: See `Host`; what is no mapping is the argument `training` of the module.
          **kwargs: Sample inputs by keyword.

        Raises:
          TypeError: `module` is no Linen module.

        Example:
            >>> import jax
            >>> x = jax.numpy.ones((2, 4))
            >>> Host.init(nn.Dense(3), jax.random.key(0), x).bias.shape
            (3,)
        """
        check_linen_module(module)
        training, kwargs = _mode_or_argument(training, kwargs)
        keys = draw(rngs) if isinstance(rngs, nnx.Rngs) else rngs
        layout = Layout()
        with _watched(layout, method) as watched:
            variables = module.init(keys, *args, method=watched, **kwargs)
        # `nn.jit` runs equal modules by one trace: the first call will see them all.
        layout.complete = layout.has_modules_of(variables)
        options: dict[str, Any] = {"mutable": mutable, "training": training, "_layout": layout}
        return cls(module, variables, rngs=rngs, **options)


def _mode_or_argument(
    training: Any, kwargs: dict[str, Any]
) -> tuple[Mapping[str, bool] | None, dict[str, Any]]:
    """``training`` and the sample inputs by keyword, among which it is where it is no mapping."""
    if training is None or isinstance(training, Mapping):
        return training, kwargs
    return None, {**kwargs, "training": training}


@contextlib.contextmanager
def _watched(layout: Layout, method: Method) -> Iterator[Method]:
    """A method whose modules the layout notes while it runs in this context."""
    with layout.watching():
        yield marked(method, [layout.mark])


def _layout_of_call(
    module: nn.Module,
    variables: Variables,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: Method,
    mutable: CollectionFilter | None,
) -> Layout:
    """What is known of the modules after a call, of which nothing is computed."""
    layout = Layout()
    keys = {"params": jax.random.key(0)}
    # Parameters that are not there are an error, whereas a cache may be made.
    changeable = DenyList("params") if mutable is None else mutable

    def run(variables: Variables, *args: Any, **kwargs: Any) -> Any:
        with _watched(layout, method) as watched:
            options: dict[str, Any] = {"rngs": keys, "method": watched, "mutable": changeable}
            module.apply(variables, *args, **options, **kwargs)

    try:
        abstractly(run, (variables, *args), kwargs)
    except Exception as error:
        explain(error, module, variables, args, kwargs, method, frozenset())
        # Linen's own errors are of the variables, and others may be of the inputs.
        of_variables = isinstance(error, FlaxError)
        found = None if of_variables else _layout_of_init(module, variables, args, kwargs, method)
        if found is None:
            raise
        layout = found
    layout.complete = layout.has_modules_of(variables)
    return layout


def _layout_of_init(
    module: nn.Module,
    variables: Variables,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: Method,
) -> Layout | None:
    """What is known of the modules where sample inputs are those of `init` alone.

    A model that decodes step by step gets a whole sequence there. None where the variables are not
    what `init` makes of these inputs.
    """
    layout = Layout()
    keys = {"params": jax.random.key(0)}

    def init(*args: Any, **kwargs: Any) -> None:
        with _watched(layout, method) as watched:
            module.init(keys, *args, method=watched, **kwargs)

    try:
        if differences(module, variables, args, kwargs, method):
            return None
        abstractly(init, args, kwargs)
    except Exception:  # noqa: BLE001  (The error of the call, which the caller raises, says more.)
        return None
    return layout


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


def host_program(model: Any) -> Program:
    """The program of a host.

    Raises:
      TypeError: It is none, or a node of one.
    """
    if isinstance(model, Host):
        program: Program = slots(model)["_linen"].program
        return program
    found = describe(model)
    if isinstance(model, Node):
        found = f"its node {path_text(slots(model)['_linen'].path)} ({found})"
    raise TypeError(f"expected an nnx_bridge.Host, got {found}")


def check_variables(
    model: Host, *args: Any, method: Method = None, finite: bool = True, **kwargs: Any
) -> None:
    """Checks that a host holds the variables of its module, and that they are finite.

    Use it after loading weights. A call checks what it needs by itself, but not what is there
    without need, nor values.

    Args:
      model: The host.
      *args: Sample inputs, as for `Host.init`.
      method: The method that they are for.
      finite: Whether NaNs and infinities are errors.
      **kwargs: Sample inputs by keyword.

    Raises:
      TypeError: ``model`` is no host, or a node of one.
      ValueError: Variables are missing, belong to another module, have another shape, or are not
        finite; each is named.

    Example:
        >>> import jax
        >>> module, x = nn.Dense(3), jax.numpy.ones((2, 4))
        >>> check_variables(Host.init(module, jax.random.key(0), x), x)
    """
    module, found = host_program(model).module, contents(model)
    variables = found.tree
    native = frozenset(found.replacements)
    lines = differences(module, variables, args, kwargs, method, native)
    lines += not_finite(variables) if finite else []
    if lines:
        raise ValueError("\n".join([f"the variables of {type(module).__name__}:", *lines]))
