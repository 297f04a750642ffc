"""Faults of moving weights."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "a transposition is not turned around on the way back",
        "nnx_bridge/weights/_layouts.py",
        "inverse = tuple(int(i) for i in np.argsort(self.axes))",
        "inverse = self.axes",
        "tests/nnx_bridge/weights/test_layouts.py::test_the_way_back_is_the_inverse",
    ),
    Fault(
        "names of axes stay where they are when an array is transposed",
        "nnx_bridge/weights/_layouts.py",
        "return [n and tuple(n[axis] for axis in self.axes) for n in names]",
        "return list(names)",
        "tests/nnx_bridge/weights/test_stacks.py"
        "::test_the_names_of_axes_follow_the_layout_of_a_rule",
    ),
    Fault(
        "gates are joined along the first axis",
        "nnx_bridge/weights/_layouts.py",
        "[xp.concatenate(xs, self.axis)]",
        "[xp.concatenate(xs, 0)]",
        "tests/nnx_bridge/weights/test_layouts.py::test_the_way_back_is_the_inverse",
    ),
    Fault(
        "what NNX has no place for may be anything",
        "nnx_bridge/weights/_layouts.py",
        "if not largest == 0:",
        "if False:",
        "tests/nnx_bridge/weights/test_layouts.py"
        "::test_what_is_absent_must_be_zero_and_comes_back_as_zeros",
    ),
    Fault(
        "gates of a GRU are in another order",
        "nnx_bridge/weights/_registry.py",
        'yield from _gates("i", "rzn", shapes)',
        'yield from _gates("i", "zrn", shapes)',
        "tests/nnx_bridge/weights/test_layers.py"
        "::test_the_layer_converts_with_its_outputs_and_gradients[GRUCell]",
    ),
    Fault(
        "a rule may be overruled",
        "nnx_bridge/weights/_match.py",
        "targets[leaf.path] = found\n",
        "pass\n",
        "tests/nnx_bridge/weights/test_rules.py::test_a_rule_wins_over_what_would_be_proposed",
    ),
    Fault(
        "an array that is missing is no problem",
        "nnx_bridge/weights/_problems.py",
        "if not allowed(target.path, plan.allow_missing):",
        "if False:",
        "tests/nnx_bridge/weights/test_load.py::test_an_array_that_is_missing_is_an_error",
    ),
    Fault(
        "an array too much is no problem",
        "nnx_bridge/weights/_problems.py",
        "if leaf.path not in undecided and not allowed(leaf.path, plan.allow_extra):",
        "if False:",
        "tests/nnx_bridge/weights/test_load.py::test_an_array_too_much_is_an_error",
    ),
    Fault(
        "another dtype is no problem",
        "nnx_bridge/weights/_problems.py",
        "elif want.dtype != leaf.dtype and not allowed(path, cast):",
        "elif False:",
        "tests/nnx_bridge/weights/test_load.py"
        "::test_an_array_of_another_dtype_is_an_error_unless_it_may_be_cast",
    ),
    Fault(
        "axes that are named in another order are no problem",
        "nnx_bridge/weights/_problems.py",
        "return ours != theirs and sorted(map(str, ours)) == sorted(map(str, theirs))",
        "return False",
        "tests/nnx_bridge/weights/test_stacks.py"
        "::test_axes_that_are_named_in_another_order_are_an_error",
    ),
    Fault(
        "outputs that differ are let through",
        "nnx_bridge/weights/_load.py",
        "if not error <= limit:",
        "if False:",
        "tests/nnx_bridge/weights/test_load.py"
        "::test_exchanged_layers_are_found_by_the_calls_that_follow",
    ),
    Fault(
        "a dry run writes",
        "nnx_bridge/weights/_load.py",
        "    if dry_run:\n        return plan\n",
        "",
        "tests/nnx_bridge/weights/test_load.py::test_a_dry_run_changes_nothing",
    ),
    Fault(
        "the model is written before its outputs are compared",
        "nnx_bridge/weights/_load.py",
        "copy = nnx.merge(graphdef, nnx.from_flat_state(list(old.items())), copy=True)",
        "nnx.update(model, nnx.from_flat_state(new))\n"
        "        copy = nnx.merge(graphdef, nnx.from_flat_state(list(old.items())), "
        "copy=True)",
        "tests/nnx_bridge/weights/test_load.py"
        "::test_exchanged_layers_are_found_by_the_calls_that_follow",
    ),
    Fault(
        "weights leave the devices of the model",
        "nnx_bridge/weights/_load.py",
        "value = placed_like(value, held)",
        "pass",
        "tests/nnx_bridge/weights/test_load.py"
        "::test_the_arrays_of_a_sharded_model_stay_where_they_are",
    ),
    Fault(
        "names of axes are not given to the model",
        "nnx_bridge/weights/_load.py",
        "            variable.set_metadata(out_sharding=names[path])\n",
        "            pass\n",
        "tests/nnx_bridge/weights/test_stacks.py"
        "::test_the_name_of_a_stacks_axis_goes_and_comes_with_it",
    ),
    Fault(
        "groups that could be exchanged are not ambiguous",
        "nnx_bridge/weights/_assign.py",
        "if real and len(ours) + len(theirs) > 2:",
        "if False:",
        "tests/nnx_bridge/weights/test_assign.py"
        "::test_what_several_cheapest_assignments_disagree_on_is_ambiguous",
    ),
    Fault(
        "the order of use is not looked at",
        "nnx_bridge/weights/_search.py",
        "cost += _ORDER * ((distance > 0) + distance / max(cost.shape))",
        "cost += 0 * distance",
        "tests/nnx_bridge/weights/test_match.py::test_the_order_of_use_decides_where_names_do_not",
    ),
    Fault(
        "values come back without their boxes",
        "nnx_bridge/weights/_plan.py",
        "if leaf.box is not None and boxed}",
        "if leaf.box is not None and not boxed}",
        "tests/nnx_bridge/weights/test_stacks.py"
        "::test_the_name_of_a_stacks_axis_goes_and_comes_with_it",
    ),
    Fault(
        "a stack may have another number of layers",
        "nnx_bridge/weights/_stacked.py",
        "if not -len(shape) <= axis < len(shape) or shape[axis] != count:",
        "if False:",
        "tests/nnx_bridge/weights/test_layouts.py::test_another_number_of_layers_is_an_error",
    ),
    Fault(
        "a list may have another number of layers",
        "nnx_bridge/weights/_stacked.py",
        "        if left:\n",
        "        if False:\n",
        "tests/nnx_bridge/weights/test_layouts.py::test_another_number_of_layers_is_an_error",
    ),
    Fault(
        "square arrays beside transposed ones are copied",
        "nnx_bridge/weights/_search.py",
        "for pair in squares(self.pairs, self._fits):",
        "for pair in squares([], self._fits):",
        "tests/nnx_bridge/weights/test_match.py"
        "::test_a_square_kernel_beside_transposed_ones_is_not_taken_silently",
    ),
]
