"""Faults of the transforms and the functionaliser of Linen."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "integers are differentiated",
        "lifted/_inputs.py",
        "            if w and is_differentiable(x)\n",
        "            if w\n",
        "tests/lifted/test_outputs.py::test_variables_that_cannot_be_differentiated",
    ),
    Fault(
        "leaves get the values of others",
        "lifted/_inputs.py",
        "for i, value in zip(self.active, values, strict=True):",
        "for i, value in zip(self.active, values[::-1], strict=True):",
        "tests/lifted/test_programs.py::test_grad_of_parameters_and_input",
    ),
    Fault(
        "negative argnums are out of range",
        "lifted/_inputs.py",
        "if not -len(primals) <= i < len(primals):",
        "if not 0 <= i < len(primals):",
        "tests/lifted/test_outputs.py::test_argnums_select_primals",
    ),
    Fault(
        "updates are not published",
        "lifted/_engine.py",
        "        functional.publish(updates)\n",
        "",
        "tests/lifted/test_writes.py::test_the_writes_are_those_of_a_plain_call",
    ),
    Fault(
        "inside init the gradient of created variables is left out",
        "lifted/_engine.py",
        "            if extended is not None:\n",
        "            if False:\n",
        "tests/lifted/test_init.py::test_the_result_has_the_structure_that_it_has_in_apply",
    ),
    Fault(
        "a vector passes for a scalar",
        "lifted/_engine.py",
        "        if np.shape(y) != ():\n",
        "        if False:\n",
        "tests/lifted/test_errors.py::test_an_output_that_is_not_scalar",
    ),
    Fault(
        "an unknown variable has a tangent",
        "lifted/_tangents.py",
        "if key not in values and jax.tree.leaves(tangent) and not partial:",
        "if False:",
        "tests/lifted/test_errors_of_tangents.py::test_a_bad_tangent_of_a_variable",
    ),
    Fault(
        "a tangent may have another shape",
        "lifted/_tangents.py",
        "    if np.shape(tangent) != np.shape(value):\n",
        "    if False:\n",
        "tests/lifted/test_errors_of_tangents.py::test_a_bad_tangent_of_a_variable",
    ),
    Fault(
        "gradients of what is mapped are summed, too",
        "lifted/_reduce.py",
        "if marker_mapped and not value_mapped:",
        "if marker_mapped:",
        "tests/lifted/test_reduce_axes.py"
        "::test_what_is_broadcast_is_summed_and_what_is_mapped_is_not",
    ),
    Fault(
        "gradients are not summed",
        "lifted/_reduce.py",
        "if marker_mapped and not value_mapped:",
        "if False:",
        "tests/lifted/test_reduce_axes.py"
        "::test_what_is_broadcast_is_summed_and_what_is_mapped_is_not",
    ),
    Fault(
        "writes to a closed-over module are not seen",
        "lifted/_closures.py",
        "if path in old and old[path] is value or not traces(value) & ours:",
        "if True:",
        "tests/lifted/test_closures.py::test_statistics_of_a_module_that_is_not_in_mdl",
    ),
    Fault(
        "writes to a closed-over module are not undone",
        "lifted/_closures.py",
        "            f.restore(state)\n",
        "            pass\n",
        "tests/lifted/test_closures.py::test_the_error_leaves_no_tracer_behind",
    ),
    Fault(
        "tangents of integers that fn wrote are missing",
        "lifted/_forward.py",
        "next(dots) if is_differentiable(x) else zeros_float0(np.shape(x))",
        "next(dots)",
        "tests/lifted/test_tangents.py::test_tangents_of_written_integers_are_trivial",
    ),
    Fault(
        "variables that a Linen module wrote are lost",
        "lifted/_linen.py",
        "                    root.scope.put_variable(col, name, value)\n",
        "                    pass\n",
        "tests/lifted/test_writes.py::test_the_writes_are_those_of_a_plain_call",
    ),
    Fault(
        "streams of Linen stay where they are",
        "lifted/_linen.py",
        "            advance(root.scope.rng_counters, ended)\n",
        "            pass\n",
        "tests/lifted/test_filters.py::test_draws_go_on_after_the_transform",
    ),
    Fault(
        "streams that are left out can be drawn from",
        "lifted/_linen.py",
        "if in_filter(self._rngs, name)}",
        "if True}",
        "tests/lifted/test_filters.py::test_a_stream_that_is_left_out_is_missing",
    ),
    Fault(
        "collections that are left out are visible",
        "lifted/_linen.py",
        "if in_filter(visible, c)}",
        "if True}",
        "tests/lifted/test_filters.py::test_the_visible_collections",
    ),
    Fault(
        "what is only visible can be written",
        "lifted/_linen.py",
        "mutable=intersect_filters(outer.mutable, self._writable),",
        "mutable=outer.mutable,",
        "tests/lifted/test_filters.py::test_what_is_only_differentiated_cannot_be_written",
    ),
    Fault(
        "the Hessian has its inputs in the wrong order",
        "lifted/_jacobian.py",
        "_entry(layout, derivatives[k], shape + shapes[k], 1), zero)",
        "_entry(layout, [d[k] for d in derivatives], shape + shapes[k], 1), zero)",
        "tests/lifted/test_jacobian.py::test_an_entry_of_a_hessian_has_the_shapes_of_both_inputs",
    ),
    Fault(
        "a predicate of a list counts only with all others",
        "lifted/_linen.py",
        "lambda *chosen: any(chosen)",
        "lambda *chosen: all(chosen)",
        "tests/lifted/test_filters.py::test_a_list_of_names_and_predicates",
    ),
    Fault(
        "the product with the Hessian is the gradient",
        "lifted/_hvp.py",
        "_, product, (aux, updates) = jax.jvp(",
        "product, _, (aux, updates) = jax.jvp(",
        "tests/lifted/test_composition.py::test_hvp_is_forward_over_reverse",
    ),
    Fault(
        "tangents of a linear map go to the next input",
        "lifted/_forward.py",
        "for _, (t, a) in sorted(active.items())",
        "for _, (t, a) in sorted(active.items(), reverse=True)",
        "tests/lifted/test_tangents.py::test_linearize_takes_partial_tangents",
    ),
]
