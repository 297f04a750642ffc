"""Watching a function for writes to modules that it closes over.

A transform gives ``fn`` copies of its targets. What ``fn`` writes to another module of the caller
goes past the transform: a value that belongs to the transform would outlive it there. Linen lets
such a tracer pass, to fail where it is used next, if at all.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from lifted._errors import path_text
from lifted._functional import Functional
from lifted._jax_private import traces

# What the transforms in progress functionalise, outermost first: a module that an inner function
# closes over may belong to a model that an outer one knows.
_in_progress: ContextVar[tuple[Functional, ...]] = ContextVar("in_progress", default=())


@contextlib.contextmanager
def watched(name: str, functional: Functional, traced: Any, held: Any) -> Iterator[None]:
    """A context in which the transform ``name`` calls ``fn``; undoes all writes that went past the
    transform where it raises.

    Args:
      name: of the transform, for the message.
      functional: of the targets.
      traced: what ``fn`` is given.
      held: what the caller gave.

    Raises:
      ValueError: ``fn`` wrote a value of this transform to a module that it closes over.
    """
    functionals = (*_in_progress.get(), functional)
    before = [f.outside() for f in functionals]
    token = _in_progress.set(functionals)
    try:
        yield
        _check(name, functionals, before, traces(traced) - traces(held))
    except BaseException:
        for f, state in zip(functionals, before, strict=True):
            f.restore(state)
        raise
    finally:
        _in_progress.reset(token)


def _check(name: str, functionals: tuple[Functional, ...], before: list[Any], ours: Any) -> None:
    for f, state in zip(functionals, before, strict=True):
        for old, new in zip(state, f.outside(), strict=True):
            for path, value in new.items():
                if path in old and old[path] is value or not traces(value) & ours:
                    continue
                raise ValueError(
                    f"{name}: fn wrote {path_text(path)} of a module that it closes over. The "
                    "value belongs to this transform and is of no use outside. Put that module "
                    f"into mdl, which may be a pytree: lifted.{name}(fn, (mdl, other), ...) calls "
                    "fn((mdl, other), ...)."
                )
