"""Faults of the functionaliser of NNX."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "a hidden Variable is visible",
        "nnx_bridge/functional/_group.py",
        "            if not visible(path[1:], leaf)\n",
        "            if False\n",
        "tests/nnx_bridge/functional/test_filters.py::test_the_visible_variables",
    ),
    Fault(
        "what is written in place is the caller's",
        "nnx_bridge/functional/_group.py",
        "fresh = treedef.unflatten(parts)  # type: ignore[attr-defined]",
        "fresh = leaves",
        "tests/nnx_bridge/functional/test_writes.py::test_the_writes_are_those_of_a_plain_call",
    ),
    Fault(
        "given variables are not put into the copies",
        "nnx_bridge/functional/_group.py",
        "given.get(path, leaf) for path",
        "leaf for path",
        "tests/nnx_bridge/functional/test_filters.py::test_tangents_in_every_form",
    ),
    Fault(
        "written Variables are not published",
        "nnx_bridge/functional/_group.py",
        "            for _, original, variable in changed:\n                write(",
        "            for _, original, variable in changed[1:]:\n                write(",
        "tests/nnx_bridge/functional/test_writes.py::test_the_writes_are_those_of_a_plain_call",
    ),
    Fault(
        "Variables are written before all of them are checked",
        "nnx_bridge/functional/_group.py",
        "            for path, original, _ in changed:\n                check_writable",
        "            for path, original, _ in changed[:0]:\n                check_writable",
        "tests/nnx_bridge/functional/test_failures.py"
        "::test_of_two_modules_neither_is_written_where_one_belongs_to_another_trace",
    ),
    Fault(
        "a change of the graph is not seen",
        "nnx_bridge/functional/_group.py",
        "if snapshot.holds():",
        "if True:",
        "tests/nnx_bridge/functional/test_writes.py::test_the_graph_is_that_after_a_plain_call",
    ),
    Fault(
        "new values take the place of old ones",
        "nnx_bridge/functional/_group.py",
        "next(new) if source is None else old[source.place]",
        "next(new) if source is None else old[source.place - 1]",
        "tests/nnx_bridge/functional/test_writes.py::test_the_graph_is_that_after_a_plain_call",
    ),
    Fault(
        "an unchanged Variable counts as written",
        "nnx_bridge/functional/_group.py",
        "if path not in old or not _unchanged(old[path], leaf)",
        "if True",
        "tests/nnx_bridge/functional/test_filters.py::test_tangents_of_written_variables",
    ),
    Fault(
        "a created Variable is forgotten",
        "nnx_bridge/functional/_group.py",
        "if path not in old or not _unchanged(old[path], leaf)",
        "if path in old and not _unchanged(old[path], leaf)",
        "tests/nnx_bridge/functional/test_filters.py::test_tangents_of_created_variables",
    ),
    Fault(
        "no note where fn writes to a module that it closes over",
        "nnx_bridge/functional/_group.py",
        "error.add_note(note)",
        "pass",
        "tests/nnx_bridge/functional/test_errors.py::test_a_write_to_a_module_that_fn_closes_over",
    ),
    Fault(
        "hidden Variables are not put back",
        "nnx_bridge/functional/_hidden.py",
        "for slots, key, before, after in reversed(taken):",
        "for slots, key, before, after in []:",
        "tests/nnx_bridge/functional/test_filters.py::test_the_visible_variables",
    ),
    Fault(
        "what the caller puts in a hidden place is lost",
        "nnx_bridge/functional/_hidden.py",
        "if slots.get(key, _ABSENT) is after:",
        "if True:",
        "tests/nnx_bridge/functional/test_filters.py"
        "::test_what_fn_puts_in_the_place_of_a_hidden_variable_stays",
    ),
    Fault(
        "containers that change in place are not compared",
        "nnx_bridge/functional/_snapshot.py",
        "if type(value) in _CONTAINERS and _is_mutable(value)",
        "if False",
        "tests/nnx_bridge/functional/test_writes.py"
        "::test_containers_of_python_that_are_changed_in_place",
    ),
    Fault(
        "what is shared is copied for each place",
        "nnx_bridge/functional/_skeleton.py",
        "if visit.nothing_twice() and not",
        "if not",
        "tests/nnx_bridge/functional/test_skeleton.py::test_a_copy_has_the_graph_of_the_original",
    ),
    Fault(
        "a predicate of DenyList is not negated",
        "nnx_bridge/functional/_filters.py",
        "return lambda path, leaf: not denied(path, leaf)",
        "return lambda path, leaf: denied(path, leaf)",
        "tests/nnx_bridge/functional/test_filters.py::test_what_a_filter_selects",
    ),
    Fault(
        "unknown tangents are dropped",
        "nnx_bridge/functional/_tangents.py",
        "    if rest:\n",
        "    if False:\n",
        "tests/nnx_bridge/functional/test_errors.py::test_a_bad_tangent_of_a_variable",
    ),
    Fault(
        "tangents may not hold references",
        "nnx_bridge/functional/_tangents.py",
        "tangents = jax.tree.map(plain, tangents, is_leaf=lambda x: isinstance(x, nnx.Variable))",
        "pass",
        "tests/nnx_bridge/functional/test_references.py::test_tangents_may_hold_references",
    ),
    Fault(
        "a reference is replaced by an array",
        "nnx_bridge/functional/_storage.py",
        "    if not holds_reference(original):\n",
        "    if True:\n",
        "tests/nnx_bridge/functional/test_references.py"
        "::test_results_and_writes_are_those_of_plain_variables",
    ),
    Fault(
        "a reference gets a value that it cannot hold",
        "nnx_bridge/functional/_storage.py",
        "if np.shape(new) != np.shape(held) or dtype_of(new) != dtype_of(held):",
        "if False:",
        "tests/nnx_bridge/functional/test_references.py::test_a_shape_that_a_reference_cannot_hold",
    ),
    Fault(
        "a reference that fn makes is an array afterwards",
        "nnx_bridge/functional/_group.py",
        "leaves[place] = leaves[place].copy(ref=True)",
        "pass",
        "tests/nnx_bridge/functional/test_references.py"
        "::test_a_reference_that_fn_makes_is_one_afterwards",
    ),
    Fault(
        "what is written to references is lost where the graph changes",
        "nnx_bridge/functional/_group.py",
        "        for original, variable in contents:\n            write(original, variable)\n",
        "",
        "tests/nnx_bridge/functional/test_references.py"
        "::test_variables_of_a_changed_graph_are_still_the_same_objects",
    ),
    Fault(
        "changed metadata of a reference is not written",
        "nnx_bridge/functional/_storage.py",
        "if metadata != original.get_metadata():",
        "if False:",
        "tests/nnx_bridge/functional/test_references.py::test_the_graph_is_that_after_a_plain_call",
    ),
    Fault(
        "any name of a stream lets all streams through",
        "nnx_bridge/functional/_filters.py",
        "return in_filter(rngs, name) if stream",
        "return bool(rngs) if stream",
        "tests/nnx_bridge/functional/test_filters.py::test_a_stream_that_is_left_out_is_missing",
    ),
]
