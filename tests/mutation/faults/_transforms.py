"""Faults of Linen's lifted transforms."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        # What is kept makes a difference from JAX 0.12 on; before, this one survives.
        "what JAX keeps of a custom_vjp holds the arrays of the module",
        "nnx_bridge/transforms/_custom_vjp.py",
        "pure = bare(functional)",
        "pure = functional",
        "tests/nnx_bridge/transforms/test_variables.py::test_a_backward_pass_of_the_users",
    ),
    Fault(
        "the condition of a loop draws what the step draws",
        "nnx_bridge/transforms/_while_loop.py",
        "step(state, -1)",
        "step(state, 1)",
        "tests/nnx_bridge/transforms/test_control_flow.py::test_a_condition_draws_what_linen_draws",
    ),
    Fault(
        "streams stay where they are in a loop that ends by itself",
        "nnx_bridge/transforms/_while_loop.py",
        "counts = [kept.pop(key, lifting.parts[key]) for key in inputs.counts]",
        "counts = [(kept.pop(key, 0), lifting.parts[key])[1] for key in inputs.counts]",
        "tests/nnx_bridge/transforms/test_control_flow.py"
        "::test_a_loop_advances_streams_as_one_step_does",
    ),
    Fault(
        "streams stay where they are in a loop",
        "nnx_bridge/transforms/_loop.py",
        "kept.pop(key, self._lifting.parts[key] if isinstance(key, int) else was)",
        "(kept.pop(key, None), was)[1]",
        "tests/nnx_bridge/transforms/test_targets.py"
        "::test_a_loop_of_one_step_does_what_a_plain_call_does",
    ),
    Fault(
        "a loop leaves the count of its last step",
        "nnx_bridge/transforms/_loop.py",
        "        alike[:highest] = map(jnp.maximum, alike[:highest], left[:highest])\n",
        "",
        "tests/nnx_bridge/transforms/test_control_flow.py"
        "::test_no_key_is_drawn_twice_where_only_some_steps_draw",
    ),
    Fault(
        "a loop that ends by itself leaves the count of its last step",
        "nnx_bridge/transforms/_while_loop.py",
        "counts = list(map(jnp.maximum, counts, highest))",
        "pass",
        "tests/nnx_bridge/transforms/test_control_flow.py"
        "::test_no_key_is_drawn_twice_where_only_some_steps_draw",
    ),
    Fault(
        "of a carry that changes only the structure is named",
        "nnx_bridge/transforms/_carry.py",
        "            if old != new:\n",
        "            if False:\n",
        "tests/nnx_bridge/transforms/test_errors.py::test_a_carry_that_changes",
    ),
    Fault(
        "remat shows all collections",
        "nnx_bridge/transforms/_remat.py",
        'functionalized("checkpoint", mdl, variables=variables, rngs=rngs)',
        'functionalized("checkpoint", mdl, rngs=rngs)',
        "tests/nnx_bridge/transforms/test_parameters.py::test_filters_of_what_is_visible",
    ),
    Fault(
        "remat_scan puts the axes of Variables in front",
        "nnx_bridge/transforms/_remat.py",
        '"variable_axes": variable_axes,',
        '"variable_axes": _ALL_ALONG_0,',
        "tests/nnx_bridge/transforms/test_parameters.py"
        "::test_remat_scan_puts_the_axis_where_it_is_told",
    ),
    Fault(
        "map_variables shows all streams",
        "nnx_bridge/transforms/_map_variables.py",
        "mdl, variables=visible, rngs=rngs)",
        "mdl, variables=visible)",
        "tests/nnx_bridge/transforms/test_parameters.py::test_filters_of_what_is_visible",
    ),
    Fault(
        "_split_transpose is ignored",
        "nnx_bridge/transforms/_scan.py",
        '"_split_transpose": _split_transpose,',
        '"_split_transpose": False,',
        "tests/nnx_bridge/transforms/test_parameters.py::test_the_option_that_splits_the_transpose",
    ),
    Fault(
        "spmd_axis_name is ignored",
        "nnx_bridge/transforms/_vmap.py",
        '"axis_name": axis_name, "spmd_axis_name": spmd_axis_name}\n        return',
        '"axis_name": axis_name}\n        return',
        "tests/nnx_bridge/transforms/test_programs.py::test_mapped_layers_on_an_axis_of_a_mesh",
    ),
    Fault(
        "methods may disagree on how Variables are made",
        "nnx_bridge/transforms/_targets.py",
        "if value != expected:",
        "if False:",
        "tests/nnx_bridge/transforms/test_errors.py"
        "::test_methods_that_disagree_on_how_variables_are_made",
    ),
    Fault(
        "what is carried is the same for all steps",
        "nnx_bridge/transforms/_scan.py",
        '("variable_carry", variable_carry, Kept.CARRY)',
        '("variable_carry", variable_carry, Kept.BROADCAST)',
        "tests/nnx_bridge/transforms/test_targets.py"
        "::test_values_that_go_from_one_variable_to_another_in_a_loop",
    ),
    Fault(
        "the keys of folded streams do not depend on the count",
        "nnx_bridge/transforms/_fold_rngs.py",
        "jax.random.fold_in(key.get_raw_value(), count.get_raw_value())",
        "jax.random.fold_in(key.get_raw_value(), 0)",
        "tests/nnx_bridge/transforms/test_variables.py::test_folded_streams_are_forks",
    ),
    Fault(
        "folded streams do not move on",
        "nnx_bridge/transforms/_fold_rngs.py",
        "count.replace(count.get_raw_value() + 1)",
        "count",
        "tests/nnx_bridge/transforms/test_variables.py::test_folded_streams_are_forks",
    ),
    Fault(
        "names of a lifted axis are not added",
        "nnx_bridge/transforms/_lifting.py",
        "if isinstance(leaf.axis, int):",
        "if False:",
        "tests/nnx_bridge/transforms/test_variables.py"
        "::test_a_named_variable_that_is_written_keeps_its_names",
    ),
    Fault(
        "what a lifted call wrote is not published",
        "nnx_bridge/transforms/_lifting.py",
        "        self.functional.publish([self.updates(form, axes, kept)])\n",
        "        self.updates(form, axes, kept)\n",
        "tests/nnx_bridge/transforms/test_targets.py"
        "::test_a_loop_of_one_step_does_what_a_plain_call_does",
    ),
    Fault(
        "every step of a stream that is split has the same key",
        "nnx_bridge/transforms/_inputs.py",
        "jax.random.split(part, size)",
        "jax.numpy.stack([part] * size)",
        "tests/nnx_bridge/transforms/test_twins.py::test_streams_have_linens_keys",
    ),
    Fault(
        "what is carried may change its shape",
        "nnx_bridge/transforms/_inputs.py",
        "        if (np.shape(before), dtype_of(before)) != (np.shape(part), dtype_of(part)):\n",
        "        if False:\n",
        "tests/nnx_bridge/transforms/test_errors.py::test_a_carried_variable_that_changes",
    ),
]
