"""Timing on noisy machines: contestants take turns, and what is reported are ratios.

In each round every contestant runs once, in an order that rotates, and each time is divided by that
of the baseline in the same round. A slow spell of the machine hits a whole round, not a contestant.
"""

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import jax
from rich.progress import track


@dataclass(frozen=True)
class Ratio:
    """Times of a contestant, or its bytes, as multiples of the baseline's.

    Attributes:
      median: median over the rounds.
      low: lower quartile.
      high: upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> "Ratio":
        """A ratio that does not vary from round to round, such as one of bytes."""
        return cls(value, value, value)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3f}"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Ratio], float]:
    """Ratios of all contestants to the baseline, and the median time of the baseline in seconds.

    Args:
      contestants: functions without arguments, by name; what they return is waited for.
      baseline: name of one of them.
      rounds: how often each runs, after two runs that do not count.
      title: shown while it works.
      clock: what is read before and after; `time.process_time` for work in Python.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_collections() as collect:
        for i in track(range(-2, rounds), description=f"{title:<44}"):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                collect()
                start = clock()
                jax.block_until_ready(contestants[name]())
                if i >= 0:
                    times[name].append(clock() - start)
    ratios = {}
    for name in names:
        of_rounds = [t / b for t, b in zip(times[name], times[baseline], strict=True)]
        low, median, high = statistics.quantiles(of_rounds, n=4)
        ratios[name] = Ratio(median, low, high)
    return ratios, statistics.median(times[baseline])


@contextlib.contextmanager
def _no_collections() -> Iterator[Callable[[], object]]:
    """Garbage is collected only where the function that is yielded is called: a collection takes as
    long as a contestant, and hits whichever is running."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def setting() -> str:
    """Versions and hardware, for the foot of a table."""
    packages = []
    for name in ("jax", "jaxlib", "flax", "equinox"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    packages.insert(0, f"Python {platform.python_version()}")
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    return f"{', '.join(packages)}; {devices}, {platform.machine()}, {os.cpu_count()} cores"
