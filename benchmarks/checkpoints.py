"""Converting a checkpoint costs little more than copying it with Orbax, in little memory.

Each contestant runs in a process of its own, so that what one has read into memory is not the
other's.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import Ratio
from benchmarks._results import Table

# The most time, as a multiple of a copy with Orbax, and the most memory above the interpreter's.
CLAIM = 1.5
MEGABYTES = 400
SIZE = float(os.environ.get("FLAXLIFT_BENCHMARK_GB", "1"))


def _save(folder: Path, gigabytes: float) -> None:
    """A train state with Adam's moments: three times the parameters."""
    import jax
    import orbax.checkpoint as ocp

    layers, width = 10, int((gigabytes * 1e9 / 4 / 3 / 10) ** 0.5)
    draw = np.random.default_rng(0)

    def tree() -> Any:
        return {
            f"Dense_{i}": {
                "kernel": jax.numpy.asarray(draw.standard_normal((width, width), np.float32)),
                "bias": jax.numpy.zeros(width),
            }
            for i in range(layers)
        }

    adam = {"count": jax.numpy.int32(1), "mu": tree(), "nu": tree()}
    state = {"params": tree(), "opt_state": [adam, None], "step": jax.numpy.int32(1)}
    ocp.PyTreeCheckpointer().save(folder, state)


def _orbax(source: Path, destination: Path) -> None:
    import orbax.checkpoint as ocp

    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(destination, checkpointer.restore(source))


def _convert(source: Path, destination: Path) -> None:
    import nnx_bridge

    nnx_bridge.convert(source, destination)


_CONTESTANTS = {"Orbax restore and save": _orbax, "flaxlift convert": _convert}


def _worker(name: str, source: Path, destination: Path) -> None:
    """Runs a contestant in this process; prints its seconds and the memory it took."""
    import nnx_bridge  # noqa: F401  (loaded before the clock starts)

    before = _peak()
    start = time.perf_counter()
    _CONTESTANTS[name](source, destination)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": _peak() - before}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(rounds: int = 3) -> Table:
    """The table of a conversion of a train state."""
    times: dict[str, list[float]] = {name: [] for name in _CONTESTANTS}
    memory: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        _in_process("save", source, source)
        for i in range(rounds):
            for name in _CONTESTANTS:
                destination = Path(folder) / f"destination-{i}-{name.split()[0]}"
                found = _in_process(name, source, destination)
                times[name].append(found["seconds"])
                memory[name] = max(memory.get(name, 0), int(found["bytes"]))
                subprocess.run(["rm", "-rf", str(destination)], check=True)
    baseline, name = _CONTESTANTS
    table = Table("checkpoints", f"Converting a checkpoint of {SIZE:g} GB")
    ratios = sorted(t / b for t, b in zip(times[name], times[baseline], strict=True))
    seconds = float(np.median(times[baseline]))
    table.add("time", baseline, baseline, Ratio.exact(1.0), seconds)
    table.add(
        "time", name, baseline, Ratio(float(np.median(ratios)), ratios[0], ratios[-1]), None, CLAIM
    )
    for contestant in _CONTESTANTS:
        ratio = Ratio.exact(memory[contestant] / 2**20 / MEGABYTES)
        claim = 1.0 if contestant == name else None
        table.add("peak memory", contestant, f"{MEGABYTES} MB", ratio, None, claim)
    return table


def _in_process(name: str, source: Path, destination: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.checkpoints", name, str(source), str(destination)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1]) if out.stdout else {}
    return found


if __name__ == "__main__":
    contestant, *paths = sys.argv[1:]
    source, destination = map(Path, paths)
    if contestant == "save":
        _save(source, SIZE)
    else:
        _worker(contestant, source, destination)
