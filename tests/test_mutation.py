"""The faults of `make mutants` are faults of the code as it is."""

from __future__ import annotations

import pytest

from tests.mutation._fault import ROOT, Fault
from tests.mutation._faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_the_fault_can_be_planted(fault: Fault) -> None:
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.planted(source) != source
    named = [word.partition("::")[0] for word in fault.tests.split() if "/" in word]
    assert named and all((ROOT / name).exists() for name in named)
