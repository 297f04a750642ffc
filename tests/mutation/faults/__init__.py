"""The faults, by what they are faults of."""

from __future__ import annotations

import importlib
import pkgutil

from tests.mutation._fault import Fault

FAULTS: list[Fault] = [
    fault
    for area in pkgutil.iter_modules(__path__)
    for fault in importlib.import_module(f"{__name__}.{area.name}").FAULTS
]
