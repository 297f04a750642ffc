"""The parts of Flax Linen that `lifted` needs and that Flax does not document.

Linen has no public way to take a bound module off its scope and put a copy of it on another one.
Its own lifted transforms do this with the functions below. They are used from here only, and
``tests/lifted/test_flax_private.py`` checks each of them against the behaviour that we rely on, so
that a change in Flax fails there first and by name.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import Scope, in_filter
from flax.linen import module as linen_module
from flax.linen import transforms as linen_transforms


def module_scopes(module: nn.Module) -> list[Scope]:
    """Scopes of ``module``: first those of modules and variables in its fields, its own last."""
    _settle(module)
    state = module._state
    new = state.setup_called == linen_module.SetupState.NEW
    if new:
        # Or Linen would run `setup` without variables, to check it, and fail where that reads what
        # the `setup` of a submodule makes of its parameters.
        state.setup_called = linen_module.SetupState.TRANSFORMED
    try:
        scopes, _, _ = linen_transforms.get_module_scopes(module)
    finally:
        if new:
            state.setup_called = linen_module.SetupState.NEW
    return scopes


def _settle(module: nn.Module) -> None:
    """Runs `setup` where it may still change scopes: `nn.share_scope` with modules in fields."""
    fields = [f.name for f in dataclasses.fields(module) if f.name != "parent" and f.init]
    held = jax.tree.leaves([getattr(module, name) for name in fields])
    inner = [x for x in held if isinstance(x, nn.Module) and x.scope is not None]
    if any(isinstance(x, nn.Module) for x in held):
        module._try_setup()
    for x in inner:
        _settle(x)


def rebind(module: nn.Module, scopes: Sequence[Scope], state: Any) -> nn.Module:
    """A copy of ``module`` on other ``scopes``, in the order of `module_scopes`, in internal state
    ``state``."""
    clone, _, _ = linen_transforms.set_module_scopes(module, (), {}, scopes)
    object.__setattr__(clone, "_state", state)
    return clone


def export_state(module: nn.Module) -> Any:
    """What a copy of ``module`` has to know about the call in progress: naming cursor, compact and
    setup flags."""
    return module._state.export()


def import_state(module: nn.Module, state: Any) -> None:
    """Brings ``module`` to the state in which a copy of it ended."""
    module._state.reimport(state)


def copy_state(state: Any) -> Any:
    """A state that a call may advance without advancing ``state``."""
    return dataclasses.replace(state, autoname_cursor=dict(state.autoname_cursor), children={})


def live_collections(scope: Scope) -> dict[str, Any]:
    """The dictionaries that ``scope``, a root, may write to; `Scope.mutable_variables` may be a
    copy of them."""
    return {
        name: values for name, values in scope._variables.items() if in_filter(scope.mutable, name)
    }


def current_module() -> nn.Module | None:
    """The module whose method runs: modules made now become its submodules."""
    return linen_module._context.module_stack[-1]


@contextlib.contextmanager
def within(module: nn.Module) -> Iterator[None]:
    """A context like the body of a method of ``module``, with no call that interceptors see."""
    module._try_setup()
    linen_module._context.module_stack.append(module)
    try:
        yield
    finally:
        linen_module._context.module_stack.pop()
