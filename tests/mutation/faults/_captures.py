"""Faults of captures."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "recorded values may be written in another trace",
        "nnx_bridge/captures/_records.py",
        "if _flax_private.trace_state() != self._trace_state:",
        "if False:",
        "tests/nnx_bridge/captures/test_context.py"
        "::test_a_jax_transform_that_closes_over_the_module",
    ),
    Fault(
        "pytrees are perturbed as they are",
        "nnx_bridge/captures/_records.py",
        "return value if jax.tree_util.all_leaves([value]) else _Addend(value)",
        "return value",
        "tests/nnx_bridge/captures/test_context.py::test_pytrees_are_perturbed_leaf_by_leaf",
    ),
    Fault(
        "the class of a module is not restored",
        "nnx_bridge/captures/_method_outputs.py",
        "        for module, cls in zip(modules, classes, strict=True):\n"
        '            object.__setattr__(module, "__class__", cls)\n',
        "        pass\n",
        "tests/nnx_bridge/captures/test_context.py::test_copies_get_their_classes_back",
    ),
    Fault(
        "inherited methods are not sown",
        "nnx_bridge/captures/_method_outputs.py",
        "for base in cls.__mro__ for name in vars(base)",
        "for base in cls.__mro__[:1] for name in vars(base)",
        "tests/nnx_bridge/captures/test_context.py::test_outputs_of_inherited_methods_are_sown",
    ),
    Fault(
        "methods of all names are sown",
        "nnx_bridge/captures/_method_outputs.py",
        'name == "__call__" or not name.startswith("_")',
        "True",
        "tests/nnx_bridge/captures/test_context.py::test_outputs_of_inherited_methods_are_sown",
    ),
    Fault(
        "seeds of unknown modules are dropped",
        "nnx_bridge/captures/_recording.py",
        "            _check_seed(target, path)\n",
        "",
        "tests/nnx_bridge/host/test_captures.py::test_a_seed_for_a_module_that_is_not_there",
    ),
    Fault(
        "no note where a recorded value has no axis",
        "nnx_bridge/captures/_recording.py",
        "error.add_note(_BROADCAST)",
        "pass",
        "tests/nnx_bridge/captures/test_context.py"
        "::test_a_broadcast_module_needs_an_axis_for_what_it_records",
    ),
    Fault(
        "new nodes of a host keep the context",
        "nnx_bridge/captures/_recording.py",
        "            stack.callback(_leave_new, targets, known, set(types))\n",
        "",
        "tests/nnx_bridge/host/test_captures.py"
        "::test_a_node_that_a_context_has_found_is_not_marked",
    ),
    Fault(
        "what is recorded is of the default kind of Variable",
        "nnx_bridge/captures/_recording.py",
        "return kind(value, ref=False, hijax=False)",
        "return kind(value)",
        "tests/nnx_bridge/functional/test_references.py"
        "::test_captures_where_new_variables_are_references",
    ),
    Fault(
        "statistics of a capture are not published",
        "nnx_bridge/captures/_context.py",
        "        functional.publish(updates)\n",
        "",
        "tests/nnx_bridge/captures/test_context.py::test_statistics_are_updated_as_by_a_plain_call",
    ),
    Fault(
        "states of a capture are in the order of recording",
        "nnx_bridge/captures/_context.py",
        "states = [recorded[kinds.index(kind)] for kind in var_types]",
        "states = recorded[: len(var_types)][::-1]",
        "tests/nnx_bridge/captures/test_context.py"
        "::test_each_state_holds_its_own_type_in_either_order",
    ),
    Fault(
        "argnums of capture_grad are off by one",
        "nnx_bridge/captures/_derivatives.py",
        "i % len(primals) + 1 for i in chosen",
        "i % len(primals) for i in chosen",
        "tests/nnx_bridge/captures/test_derivatives.py::test_one_call_gives_what_the_recipe_gives",
    ),
    Fault(
        "the shapes of perturbations are found without the filter of variables",
        "nnx_bridge/captures/_derivatives.py",
        "lifted.functionalize(self.mdl, variables=variables, frozen=frozen, rngs=rngs)",
        "lifted.functionalize(self.mdl)",
        "tests/nnx_bridge/captures/test_derivatives.py"
        "::test_what_is_perturbed_is_what_the_visible_variables_lead_to",
    ),
    Fault(
        "perturbations start at one",
        "nnx_bridge/captures/_derivatives.py",
        "seeds = [jnp.",
        "seeds = [1 + jnp.",
        "tests/nnx_bridge/captures/test_derivatives.py::test_one_call_gives_what_the_recipe_gives",
    ),
]
