"""The context in which Linen's modules are replaced, and what it checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax.core.scope import Scope
from flax.errors import FlaxError

from nnx_bridge._collections import Path
from nnx_bridge.host._binding import path_of
from nnx_bridge.host._guard import Guard
from nnx_bridge.host._layout import Layout, is_called, shapes
from nnx_bridge.host._marks import has_mark
from nnx_bridge.host._replacement import Replacement, listing


@contextlib.contextmanager
def replacing(
    replacements: Mapping[Path, Replacement],
    layout: Layout,
    mark: int,
    base: Path = (),
    guards: Sequence[Guard] = (),
) -> Iterator[None]:
    """A context in which Linen's modules are replaced.

    Args:
      replacements: by the paths of what they replace.
      layout: what is known of the model, for checks of what they return.
      mark: that of the scopes of the model.
      base: the path of the model, where it is a part of another one.
      guards: what checks each module.
    """
    returned: set[Path] = set()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = path_of(context.module)
        if path is None or path[: len(base)] != base:
            return call(*args, **kwargs)
        for guard in guards:
            guard.check(context.module, path)
        replacement = replacements.get(path[len(base) :])
        name = context.method_name
        if replacement is None or not has_mark(context.module.scope, mark):
            return call(*args, **kwargs)
        if name == "setup":
            return _set_up(call, context.module.scope)
        if not is_called(context.module, name):
            return call(*args, **kwargs)
        result = replacement(context.module, name, args, kwargs)
        _check_returned(replacement, layout, name, (args, kwargs), result)
        returned.add(replacement.path)
        return result

    try:
        with nn.intercept_methods(intercept):
            yield
    except (TypeError, ValueError) as error:
        for path, replacement in replacements.items():
            known = layout.submodules.get(path)
            if path not in returned and known is not None and known.lifted:
                error.add_note(
                    f"{replacement.where}, is inside of a transform of Linen (nn.scan, nn.vmap, "
                    "...). If the sizes do not fit, stack its variables like those of the Linen "
                    f"module; they are {replacement.shapes}. If init alone fails, take the "
                    "variables that unhost has returned."
                )
        raise


def _set_up(call: Callable[[], None], scope: Scope) -> None:
    """Runs `setup` of a module that is replaced, so that its parent may read what it makes.

    A parent may use a parameter of a submodule, such as the matrix of an embedding.
    """
    mutable = scope.mutable
    if scope.get_flag("initializing", False):
        scope.mutable = False  # What the replacement does not have is not made either.
    try:
        call()
    except FlaxError:
        # It makes variables that the replacement does not have; its parent cannot read them.
        return
    finally:
        scope.mutable = mutable


def _check_returned(
    replacement: Replacement, layout: Layout, name: str, arguments: Any, result: Any
) -> None:
    """Checks shapes, where the Linen module was seen with such arguments."""
    expected = layout.returned.get((replacement.path, name, shapes(arguments)))
    if expected is not None and shapes(result) != expected:
        raise ValueError(
            f"{replacement.where}: {name}{listing(*arguments)} must return "
            f"{_shapes_text(expected)}, as the Linen module does, but returned "
            f"{_shapes_text(shapes(result))}"
        )


def _shapes_text(of: Any) -> str:
    parts = [f"{path} {shape}".strip() for path, shape in of]
    return ", ".join(parts) or "nothing"
