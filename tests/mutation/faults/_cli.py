"""Faults of the command."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "a difference is exit status 0",
        "nnx_bridge/cli/_check.py",
        "raise typer.Exit(0 if all(report.agrees for report in reports) else 1)",
        "raise typer.Exit(0)",
        "tests/nnx_bridge/cli/test_app.py"
        "::test_disagreement_is_exit_status_1_and_all_targets_are_checked",
    ),
    Fault(
        "the last target decides",
        "nnx_bridge/cli/_check.py",
        "0 if all(report.agrees for report in reports) else 1",
        "0 if reports[-1].agrees else 1",
        "tests/nnx_bridge/cli/test_app.py"
        "::test_disagreement_is_exit_status_1_and_all_targets_are_checked",
    ),
    Fault(
        "what cannot be run is exit status 1",
        "nnx_bridge/cli/_console.py",
        "raise typer.Exit(2) from error",
        "raise typer.Exit(1) from error",
        "tests/nnx_bridge/cli/test_app.py"
        "::test_what_cannot_be_run_is_exit_status_2_and_an_error_in_plain_words",
    ),
    Fault(
        "a table is printed among the JSON",
        "nnx_bridge/cli/_inspect.py",
        "Console(stderr=to_stdout), Console(stderr=True)",
        "Console(), Console(stderr=True)",
        "tests/nnx_bridge/cli/test_app.py::test_inspect_writes_json_to_stdout_alone",
    ),
    Fault(
        "more work than is allowed passes",
        "nnx_bridge/cli/_inspect.py",
        "more = ROUTES[list(_Route).index(at_most) + 1 :]",
        "more = ROUTES[list(_Route).index(at_most) + 2 :]",
        "tests/nnx_bridge/cli/test_app.py"
        "::test_inspect_fails_where_something_takes_more_work_than_allowed",
    ),
    Fault(
        "a dry run of the command writes",
        "nnx_bridge/cli/_convert.py",
        "                dry_run=dry_run,\n",
        "",
        "tests/nnx_bridge/cli/test_convert.py::test_a_dry_run_lists_the_arrays_and_writes_nothing",
    ),
    Fault(
        "a failed conversion is exit status 0",
        "nnx_bridge/cli/_convert.py",
        "        raise typer.Exit(2) from error\n",
        "        raise typer.Exit(0) from error\n",
        "tests/nnx_bridge/cli/test_convert.py::test_an_error_is_in_plain_words_and_exit_status_2",
    ),
    Fault(
        "the plan is not passed on",
        "nnx_bridge/cli/_convert.py",
        "plan=None if plan is None else _read_plan(plan),",
        "plan=None,",
        "tests/nnx_bridge/cli/test_convert.py::test_a_plan_is_read_from_its_file",
    ),
]
