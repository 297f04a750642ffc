"""What JAX is told before it is imported, so that all tests run in one session.

With an accelerator (JAX_PLATFORMS=cuda, say) the machine's own devices are used.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
# How many examples the property tests draw: "default", or "thorough".
PROFILE = os.environ.get("FLAXLIFT_TEST_PROFILE", "default")


def _flags() -> dict[str, int]:
    flags = {"--xla_force_host_platform_device_count": 8}
    if PROFILE != "thorough":
        # XLA makes the same programs of HLO; LLVM does not optimise them. The tests compile
        # thousands, and run each once or twice. The thorough ones run what users run.
        flags["--xla_backend_optimization_level"] = 0
    return flags


if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    given = os.environ.get("XLA_FLAGS", "")
    ours = [f"{flag}={value}" for flag, value in _flags().items() if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *ours])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
# Most programs of the tests compile in less than the second from which JAX would keep them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
