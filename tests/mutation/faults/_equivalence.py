"""Faults of the comparison of models."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "an error of a route is no row",
        "nnx_bridge/equivalence/_check.py",
        "yield from (raised(what, route, error) for what, arrays in reported.items() if arrays)",
        "yield from ()",
        "tests/nnx_bridge/equivalence/test_check.py"
        "::test_a_transform_that_raises_is_a_failure_of_every_route",
    ),
    Fault(
        "gradients with respect to inputs are not compared",
        "nnx_bridge/equivalence/_measures.py",
        '"input gradient": inexact(inputs),',
        '"input gradient": {},',
        "tests/nnx_bridge/equivalence/test_check.py::test_all_programs_of_a_module_agree",
    ),
    Fault(
        "what is not a number agrees",
        "nnx_bridge/equivalence/_verdict.py",
        "if inexact and (np.isnan(found).any() or np.isnan(wanted).any()):",
        "if False:",
        "tests/nnx_bridge/equivalence/test_report.py"
        "::test_what_is_not_a_number_never_agrees_and_is_counted",
    ),
    Fault(
        "integers may differ",
        "nnx_bridge/equivalence/_verdict.py",
        '"max_roundings": math.inf, "verdict": Verdict.DIFFERS}',
        '"max_roundings": math.inf, "verdict": Verdict.ROUNDING}',
        "tests/nnx_bridge/equivalence/test_report.py::test_integers_must_be_equal",
    ),
    Fault(
        "arrays that one side lacks are passed over",
        "nnx_bridge/equivalence/_verdict.py",
        "for path in dict.fromkeys([*reference, *actual]):",
        "for path in [p for p in reference if p in actual]:",
        "tests/nnx_bridge/equivalence/test_report.py::test_arrays_that_only_one_side_has_are_found",
    ),
    Fault(
        "anything may differ from zero",
        "nnx_bridge/equivalence/_verdict.py",
        "unit = np.full(sizes.shape, eps * scale)",
        "unit = np.full(sizes.shape, np.inf)",
        "tests/nnx_bridge/equivalence/test_report.py::test_anything_but_zero_differs_from_zero",
    ),
    Fault(
        "float64 rounds as the program does",
        "nnx_bridge/equivalence/_exact.py",
        '    if primitive.name == "reduce_precision":\n        return arguments\n',
        "",
        "tests/nnx_bridge/equivalence/test_compare.py"
        "::test_float64_is_not_rounded_where_a_program_asks_for_it",
    ),
    Fault(
        "every step starts from the first variables",
        "nnx_bridge/equivalence/_measures.py",
        "._replace(variables=variables)\n",
        "\n",
        "tests/nnx_bridge/equivalence/test_compare.py"
        "::test_what_differs_from_the_second_step_on_is_found",
    ),
    Fault(
        "the place of a fault is the last that differs",
        "nnx_bridge/equivalence/_parting.py",
        "    names = [name for name in calls if name in wanted]\n",
        "    names = [name for name in calls if name in wanted][::-1]\n",
        "tests/nnx_bridge/equivalence/test_faults.py::test_the_place_of_a_fault_is_named",
    ),
    Fault(
        "the layers of a branch that was not taken are compared",
        "nnx_bridge/equivalence/_calls.py",
        "not np.all(take(went))",
        "False",
        "tests/nnx_bridge/equivalence/test_branches.py"
        "::test_only_the_branch_that_was_taken_is_compared",
    ),
    Fault(
        "the first step of a while is taken in any case",
        "nnx_bridge/equivalence/_tags.py",
        'goes_on.astype("int32")',
        "jnp.int32(1)",
        "tests/nnx_bridge/equivalence/test_branches.py::test_a_while_gives_what_it_gave",
    ),
    Fault(
        "traces that nn.jit has are used while models are compared",
        "nnx_bridge/equivalence/_recording.py",
        "                traced_anew(),\n",
        "",
        "tests/nnx_bridge/equivalence/test_jit.py"
        "::test_compiled_modules_are_seen_and_draw_as_others_do",
    ),
    Fault(
        "texts among the outputs are passed over",
        "nnx_bridge/equivalence/_arrays.py",
        "np.frombuffer(_words(x), np.uint8)",
        "np.zeros(1)",
        "tests/nnx_bridge/equivalence/test_outputs.py::test_texts_must_be_equal",
    ),
]
