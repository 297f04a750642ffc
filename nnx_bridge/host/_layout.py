"""What is known of the Linen modules of a model: at which path which module, and what it returns.

Submodules of a `compact` method exist only while it runs, those of `setup` once a module is bound.
So they are noted when they are seen, without what binds them to that moment: as modules that can be
bound again. A module that was given to another one (a cell to an RNN, one embedding to encoder and
decoder) is noted there by its path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import errors
from flax import linen as nn

from nnx_bridge._collections import Path, Variables, flatten
from nnx_bridge._values import leaves
from nnx_bridge.host._binding import Submodule, below, is_module, path_of, unbound
from nnx_bridge.host._marks import has_mark, new_mark

Shapes = tuple[tuple[str, Any], ...]


class Layout:
    """The Linen modules of a model by their paths, and the shapes that their methods returned.

    Attributes:
      submodules: by path; the model itself is at `()`.
      returned: by path, name of the method, and shapes of the arguments.
      complete: whether a call has been watched from beginning to end.
      mark: what a call is marked with while it is watched.
    """

    def __init__(self) -> None:
        self.submodules: dict[Path, Submodule] = {}
        self.returned: dict[tuple[Path, str, Shapes], Shapes] = {}
        self.complete = False
        self.mark = new_mark()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the modules whose methods run in this context, in scopes that have its mark."""
        running: list[Path] = []

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path, method = path_of(context.module), context.method_name
            if (
                path is None
                or not is_called(context.module, method)
                or not has_mark(context.module.scope, self.mark)
            ):
                return call(*args, **kwargs)
            arguments = shapes((args, kwargs))
            inside = path in running
            running.append(path)
            try:
                result = call(*args, **kwargs)
            finally:
                running.pop()
            # After the call: what `setup` makes is there now.
            self.note(context.module)
            if not inside:  # What a module calls on itself nobody asks of its replacement.
                self.returned.setdefault((path, method, arguments), shapes(result))
            return result

        with nn.intercept_methods(note):
            yield
        self.complete = True

    def note(self, module: nn.Module) -> None:
        """Notes a bound module and those that its `setup` made."""
        path = path_of(module)
        if path is None:
            return
        # Of two modules that share a scope the outer one is noted last.
        self.submodules[path] = unbound(module)
        for child in below(module):
            if path_of(child) not in self.submodules:
                self.note(child)

    @classmethod
    def of_setup(cls, module: nn.Module, variables: Any) -> Layout:
        """What can be found without inputs: the modules that `setup` makes."""
        layout = cls()

        def note(bound: nn.Module) -> None:
            waiting = [bound]
            while waiting:
                found = waiting.pop()
                dir(found)  # Runs `setup`.
                layout.note(found)
                waiting += below(found)

        def run(variables: Any) -> None:
            # In a method: outside, modules that `setup` gives to others are taken for theirs.
            module.apply(variables, method=note, mutable=True)

        try:
            jax.eval_shape(run, variables)
        except (errors.FlaxError, AttributeError, KeyError, TypeError, ValueError):
            # Its `setup` needs what is not there; the first call will say what.
            return cls()
        return layout

    def has_modules_of(self, variables: Variables) -> bool:
        """Whether the modules of all variables are known."""
        return all(path[1:-1] in self.submodules for path, _ in flatten(variables))

    def children(self, path: Path) -> list[str]:
        """Names of the modules below the one at ``path``."""
        depth = len(path)
        return [p[-1] for p in self.submodules if len(p) == depth + 1 and p[:depth] == path]


def is_called(module: nn.Module, name: str) -> bool:
    """Whether what runs on a module under this name is one of its methods, called by the model.

    Flax itself runs `setup`. A function that a transform runs on the module, such as the body of an
    RNN's `nn.scan`, is seen like a method, but belongs to who wrote the transform.
    """
    return name != "setup" and hasattr(type(module), name)


def shapes(tree: Any) -> Shapes:
    """The shapes of the arrays of a pytree by their paths; None for what is no array."""
    # A module among them is not asked for a shape: that would run its `setup`.
    known = lambda x: not is_module(x) and hasattr(x, "shape")  # noqa: E731
    named = ((jax.tree_util.keystr(keys), x) for keys, x in leaves(tree))
    return tuple((path, np.shape(x) if known(x) else None) for path, x in named)
