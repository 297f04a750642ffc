"""The session that every test and every doctest of the project runs in.

It stands at the root, not in `tests/`, so that the doctests of the packages get the same devices.
"""

from __future__ import annotations

import os
from pathlib import Path

_CACHE = Path(__file__).parent / ".cache"

# These are read once, when JAX is first imported, so they are set before anything does so.
# With an accelerator (JAX_PLATFORMS=cuda, say) the machine's own devices are used.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    _DEVICES = "--xla_force_host_platform_device_count"
    if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jax"))
# Most programs of the tests compile in less than the second from which JAX would keep them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: E402

# Imported here once: pytest, collecting the doctests of a file whose package is not imported yet,
# would load the file a second time, with classes of its own.
import layers  # noqa: E402, F401
import lifted  # noqa: E402, F401
import nnx_bridge  # noqa: E402, F401

settings.register_profile(
    "default",
    max_examples=8,
    deadline=None,
    database=DirectoryBasedExampleDatabase(_CACHE / "hypothesis"),
    # Drawing a module traces it, which is slow by the standards of these checks.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=200)
settings.load_profile(os.environ.get("FLAXLIFT_TEST_PROFILE", "default"))
