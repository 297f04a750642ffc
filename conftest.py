"""The session that every test and every doctest of the project runs in.

It stands at the root, not in `tests/`, so that the doctests of the packages get the same devices.
"""

from __future__ import annotations

# isort: off
import gc

# JAX reads the environment once, when it is first imported.
from tests.environment import CACHE, PROFILE

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# Imported here once: pytest, collecting the doctests of a file whose package is not imported yet,
# would load the file a second time, with classes of its own.
import layers  # noqa: F401
import lifted  # noqa: F401
import nnx_bridge  # noqa: F401
# isort: on

# JAX's checks for leaks and pytest collect garbage often: what was imported is none.
gc.freeze()

settings.register_profile(
    "default",
    max_examples=8,
    deadline=None,
    database=DirectoryBasedExampleDatabase(CACHE / "hypothesis"),
    # Drawing a module traces it, which is slow by the standards of these checks.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=200)
settings.load_profile(PROFILE)
