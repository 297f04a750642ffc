"""Faults of the host."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "sown values are an input of the next call",
        "nnx_bridge/host/_frame.py",
        '        variables.pop("intermediates", None)\n',
        "",
        "tests/nnx_bridge/host/test_host.py"
        "::test_sown_values_are_those_of_the_last_call_that_recorded",
    ),
    Fault(
        "the host does not keep what the call changed",
        "nnx_bridge/host/_frame.py",
        "        write(self._node, self._contents, self.variables, updates)\n",
        "",
        "tests/nnx_bridge/host/test_host.py::test_statistics_update_by_themselves",
    ),
    Fault(
        "the host does not record what a call sows",
        "nnx_bridge/host/_frame.py",
        "            deposit(self._node, sown, below)\n",
        "            pass\n",
        "tests/nnx_bridge/host/test_captures.py::test_the_example_of_sow",
    ),
    Fault(
        "a host is never equal to another",
        "nnx_bridge/host/_program.py",
        "same = self.module is other.module or self.module == other.module",
        "same = False",
        "tests/nnx_bridge/host/test_host.py"
        "::test_under_jit_updates_arrive_and_equal_modules_share_a_compilation",
    ),
    Fault(
        "the mode of a host is turned around",
        "nnx_bridge/host/_modes.py",
        "{n: value is training for n, value in names.items()}",
        "{n: value is not training for n, value in names.items()}",
        "tests/nnx_bridge/host/test_modes.py::test_an_argument",
    ),
    Fault(
        "an argument of the call does not win over the mode",
        "nnx_bridge/host/_modes.py",
        "return Mode({}, {}",
        "Mode({}, {}",
        "tests/nnx_bridge/host/test_modes.py::test_an_explicit_argument_wins",
    ),
    Fault(
        "a field keeps the mode of the call",
        "nnx_bridge/host/_modes.py",
        "        for name, value in before.items():\n"
        "            object.__setattr__(module, name, value)\n",
        "        pass\n",
        "tests/nnx_bridge/host/test_modes.py::test_a_field_is_as_it_was_when_the_layer_has_run",
    ),
    Fault(
        "a replacement is not called",
        "nnx_bridge/host/_replacing.py",
        "replacement = replacements.get(path[len(base) :])",
        "replacement = None",
        "tests/nnx_bridge/host/test_replacements.py"
        "::test_statistics_and_streams_of_the_replacement_move",
    ),
    Fault(
        "a replacement may return another shape",
        "nnx_bridge/host/_replacing.py",
        "if expected is not None and shapes(result) != expected:",
        "if False:",
        "tests/nnx_bridge/host/test_replacements.py"
        "::test_a_replacement_of_another_shape_leaves_the_model",
    ),
    Fault(
        "what a replacement writes is lost",
        "nnx_bridge/host/_replacement.py",
        "            self._write(scope, path, variable, value)\n",
        "            pass\n",
        "tests/nnx_bridge/host/test_replacements.py"
        "::test_statistics_and_streams_of_the_replacement_move",
    ),
    Fault(
        "new state of a replacement is dropped",
        "nnx_bridge/host/_replacement.py",
        "            self._check_new(copy, captured)\n",
        "            pass\n",
        "tests/nnx_bridge/host/test_replacements.py::test_new_state_in_a_call_is_an_error",
    ),
    Fault(
        "init makes what the setup of a replaced module makes",
        "nnx_bridge/host/_replacing.py",
        "scope.mutable = False",
        "pass",
        "tests/nnx_bridge/host/test_replacements.py"
        "::test_initialisation_makes_nothing_for_what_is_replaced",
    ),
    Fault(
        "modes that a filter of jit hides are no error",
        "nnx_bridge/host/_guard.py",
        "return of_path != of_twin and",
        "return False and",
        "tests/nnx_bridge/host/test_traces.py"
        "::test_a_filter_of_jit_that_hides_modes_of_equal_modules_is_an_error",
    ),
    Fault(
        "the streams of a call that fails do not get back their counts",
        "nnx_bridge/host/_keys.py",
        "            variable.set_value(value)\n",
        "            pass\n",
        "tests/nnx_bridge/host/test_checks.py::test_a_call_that_fails_leaves_the_streams",
    ),
]
