"""Faults of collections."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "a box is forgotten",
        "nnx_bridge/_collections.py",
        "    if BOX not in metadata:\n",
        "    if True:\n",
        "tests/nnx_bridge/test_collections.py::test_values_and_their_boxes_come_back_as_they_were",
    ),
    Fault(
        "names of a changed axis are not put into the box",
        "nnx_bridge/_collections.py",
        "return box.replace(names=tuple(names))",
        "return box",
        "tests/nnx_bridge/test_collections.py"
        "::test_an_axis_that_an_nnx_transform_adds_comes_back_in_the_box",
    ),
    Fault(
        "two values of one path: the last one wins",
        "nnx_bridge/_collections.py",
        "    if path[-1] in tree:\n",
        "    if False:\n",
        "tests/nnx_bridge/test_collections.py::test_two_variables_at_one_linen_path_are_an_error",
    ),
    Fault(
        "a box for another type is taken",
        "nnx_bridge/_collections.py",
        "if value.var_type is not kind:",
        "if False:",
        "tests/nnx_bridge/test_collections.py"
        "::test_a_box_for_another_variable_type_than_its_collection_is_an_error",
    ),
    Fault(
        "a Variable forgets its Linen name",
        "nnx_bridge/_collections.py",
        "variable.set_metadata(_NAME, name)",
        "pass",
        "tests/nnx_bridge/test_collections.py::test_equal_names_in_two_collections_are_kept_apart",
    ),
    Fault(
        "the attribute of a clashing name is taken for the name",
        "nnx_bridge/_names.py",
        "return attribute[:-1]",
        "return attribute",
        "tests/nnx_bridge/host/test_names.py::test_an_attribute_says_its_name_in_linen",
    ),
    Fault(
        "a new Variable type cannot be found by pickle",
        "nnx_bridge/_variable_types.py",
        'kind.__module__, kind.__qualname__ = __name__, f"TYPES.{_quoted(collection)}"',
        "pass",
        "tests/nnx_bridge/host/test_copies.py::test_a_host",
    ),
]
