"""Hiding Variables from a function: what the filters of a transform leave out.

A hidden Variable is taken out of the place where it stands, so that reading it is the error that
reading any missing attribute is, and put back when the call ends.
"""

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from lifted._errors import Path, path_text

_ABSENT = object()


@contextlib.contextmanager
def without(targets: list[Any], hidden: Sequence[Path]) -> Iterator[None]:
    """A context in which nothing stands at the paths ``hidden``.

    Entries of lists and tuples, and targets themselves, are None there, so that others keep their
    places. What the caller puts there meanwhile stays.
    """
    taken = [_take(targets, path) for path in hidden]
    try:
        yield
    except AttributeError as error:
        missing = [path_text(path[1:]) for path in hidden if str(path[-1]) == error.name]
        if missing:
            error.add_note(
                f"The filters variables and rngs of the transform leave out {', '.join(missing)}."
            )
        raise
    finally:
        for slots, key, before, after in reversed(taken):
            _put_back(slots, key, before, after)


def _take(targets: list[Any], path: Path) -> tuple[Any, Any, Any, Any]:
    """Hides what stands at ``path``; returns the place that was written, and what stood and stands
    there."""
    slots, key, inner = _place(targets, path)
    before = slots[key]
    if isinstance(slots, MutableMapping) and not inner:
        del slots[key]
        return slots, key, before, _ABSENT
    after = _blanked(before, inner) if inner else None
    slots[key] = after
    return slots, key, before, after


def _place(targets: list[Any], path: Path) -> tuple[Any, Any, Path]:
    """The innermost place on ``path`` that can be written: its container, its key there, and the
    rest of the path, which is inside of tuples."""
    slots: Any = targets
    key, *rest = path
    place = slots, key, tuple(rest)
    for i, part in enumerate(rest):
        value = slots[key]
        if isinstance(value, (dict, list)):
            slots, key = value, part
        elif isinstance(value, tuple):
            slots, key = value, part
            continue
        else:  # An NNX object, of which the attributes are written, whatever it says to `setattr`.
            slots, key = vars(value), str(part)
        place = slots, key, tuple(rest[i + 1 :])
    return place


def _blanked(entries: tuple[Any, ...], path: Path) -> tuple[Any, ...]:
    key, *rest = path
    new = _blanked(entries[key], tuple(rest)) if rest else None
    changed = [*entries[:key], new, *entries[key + 1 :]]
    is_named = hasattr(entries, "_fields")
    return type(entries)(*changed) if is_named else tuple(changed)


def _put_back(slots: Any, key: Any, before: Any, after: Any) -> None:
    if isinstance(slots, MutableMapping):
        if slots.get(key, _ABSENT) is after:
            slots[key] = before
    elif key < len(slots) and slots[key] is after:
        slots[key] = before
