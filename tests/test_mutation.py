"""The faults of `make mutants` are faults of the code as it is, in every part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation._fault import Fault
from tests.mutation.faults import FAULTS

ROOT = Path(__file__).parents[1]
PARTS = ["lifted", "layers"] + [
    f"nnx_bridge/{folder.name}"
    for folder in sorted((ROOT / "nnx_bridge").iterdir())
    if (folder / "__init__.py").exists()
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_the_fault_can_be_planted(fault: Fault) -> None:
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.planted(source) != source
    file, _, name = fault.test.partition("::")
    function = name.partition("[")[0]
    assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_faults(part: str) -> None:
    assert sum(fault.file.startswith(f"{part}/") for fault in FAULTS) >= 4
