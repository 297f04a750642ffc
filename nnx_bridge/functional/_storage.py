"""Variables that keep their value elsewhere: in a mutable array reference, or in a hijax value.

A function is pure only over values. So a call runs on plain copies of such Variables, which hold
the arrays themselves; what was written to a copy is written into the reference afterwards.
"""

from typing import Any

import numpy as np
from flax import nnx
from flax.errors import ImmutableVariableError

from lifted._errors import Path, describe, dtype_of, path_text


def holds_reference(leaf: Any) -> bool:
    """Whether ``leaf`` is a Variable whose value is in a mutable array reference."""
    return isinstance(leaf, nnx.Variable) and bool(leaf.ref)


def is_plain(leaf: Any) -> bool:
    """Whether ``leaf`` itself holds its value."""
    # What is a Variable by its type is found out several times faster than by NNX's `isinstance`.
    is_variable = issubclass(type(leaf), nnx.Variable) or isinstance(leaf, nnx.Variable)
    return not is_variable or not (leaf.ref or leaf.hijax)


def plain(leaf: Any) -> Any:
    """``leaf``, or a copy of it that holds the value itself."""
    return leaf if is_plain(leaf) else leaf.copy(hijax=False, ref=False)


def check_fits(path: Path, before: Any, after: Any) -> None:
    """Checks that a reference that holds the value of ``before`` can hold that of ``after``.

    Raises:
      ValueError: the shape or the dtype is another one.
    """
    held, new = before.get_raw_value(), after.get_raw_value()
    if np.shape(new) != np.shape(held) or dtype_of(new) != dtype_of(held):
        raise ValueError(
            f"{path_text(path)}: fn wrote {describe(new)} to a Variable that holds a reference to "
            f"{describe(held)}. A reference keeps its shape and dtype; put a new Variable in its "
            "place, or make it with ref=False."
        )


def check_writable(path: Path, variable: Any) -> None:
    """Raises where NNX would not let ``variable`` be written here; writes nothing new.

    Raises:
      TraceContextError: it belongs to another trace.
      ImmutableVariableError: it is a hijax Variable, and this is inside a JAX transform.
    """
    if is_plain(variable):
        variable.set_raw_value(variable.get_raw_value())
    elif not holds_reference(variable):
        try:
            variable.update_from_state(plain(variable))
        except ImmutableVariableError as error:
            error.add_note(f"The Variable is {path_text(path)}; fn writes to it.")
            raise


def write(original: Any, copy: Any) -> None:
    """Gives ``original`` the value and the metadata of its plain ``copy``."""
    if not holds_reference(original):
        original.update_from_state(copy)
        return
    original.get_raw_value()[...] = copy.get_raw_value()
    kept = {name: original.get_metadata()[name] for name in ("hijax", "ref")}
    metadata = {**copy.get_metadata(), **kept}
    if metadata != original.get_metadata():
        original.set_metadata(metadata)
