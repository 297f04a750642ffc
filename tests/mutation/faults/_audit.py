"""Faults of the audit."""

from __future__ import annotations

from tests.mutation._fault import Fault

FAULTS = [
    Fault(
        "the route of a class is that of its easiest part",
        "nnx_bridge/audit/_findings.py",
        'return max(found, key=ROUTES.index, default="native")',
        'return min(found, key=ROUTES.index, default="native")',
        "tests/nnx_bridge/audit/test_audit.py"
        "::test_the_route_of_a_class_is_that_of_its_hardest_part",
    ),
    Fault(
        "a class comes before those that it uses",
        "nnx_bridge/audit/_findings.py",
        "        for used in classes[name].uses:\n            visit(used)\n",
        "",
        "tests/nnx_bridge/audit/test_audit.py"
        "::test_a_class_comes_after_those_that_it_uses_though_it_is_written_before",
    ),
    Fault(
        "another name for what was imported is not followed",
        "nnx_bridge/audit/_names.py",
        "self._names[target.id] = dotted",
        "pass",
        "tests/nnx_bridge/audit/test_audit.py::test_another_name_for_a_transform_is_followed",
    ),
    Fault(
        "annotations count as uses",
        "nnx_bridge/audit/_source.py",
        'if field in ("annotation", "returns"):',
        "if False:",
        "tests/nnx_bridge/audit/test_audit.py::test_annotations_are_no_uses",
    ),
    Fault(
        "a class of the user inside another is counted in both",
        "nnx_bridge/audit/_source.py",
        "if isinstance(node, ast.AST) and id(node) not in skipped:",
        "if isinstance(node, ast.AST):",
        "tests/nnx_bridge/audit/test_audit.py"
        "::test_what_is_in_a_class_inside_of_another_is_counted_once",
    ),
    Fault(
        "a file that cannot be read is passed over",
        "nnx_bridge/audit/_inspect.py",
        "            except SyntaxError as error:\n"
        '                problems.append(f"{shown}: {type(error).__name__}: {error}")\n',
        "            except SyntaxError:\n                pass\n",
        "tests/nnx_bridge/audit/test_audit.py::test_a_package_is_read_without_being_run",
    ),
    Fault(
        "streams that a call does not need are named",
        "nnx_bridge/audit/_trace.py",
        "            except errors.InvalidRngError:\n                found.append(missing)\n",
        "            except errors.InvalidRngError:\n"
        "                pass\n"
        "            found.append(missing)\n",
        "tests/nnx_bridge/audit/test_audit.py"
        "::test_streams_that_the_call_draws_from_are_found_whatever_their_names",
    ),
    Fault(
        "layers inside of Linen's own layers are listed",
        "nnx_bridge/audit/_trace.py",
        "if parent is not None and _is_linen(parent) and not isinstance(parent, _AROUND_OTHERS):",
        "if False:",
        "tests/nnx_bridge/audit/test_audit.py::test_layers_inside_of_a_layer_of_linen_are_its_own",
    ),
]
