"""Both models in float64, where they work in types coarser than float32.

A fault that is smaller than the noise of bfloat16 cannot be told from it in bfloat16. But what the
two programs mean can be told apart: their equations, evaluated in float64, differ where there is a
fault, by much more than float64 rounds. They are judged by the noise that the reference would have
in float32. One thing is allowed for: a constant that only one of the programs has may be the other
one's in another type, and so rounded otherwise. It is moved by half a rounding, and what that makes
of the results is noise too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx_bridge.equivalence._comparison import SAMPLES, Comparison
from nnx_bridge.equivalence._exact import FLOAT32
from nnx_bridge.equivalence._measures import AFTER, Results, wide
from nnx_bridge.equivalence._problem import Data, first_line, perturbed
from nnx_bridge.equivalence._verdict import Noise, Row


def widened_rows(comparison: Comparison, data: Data, seed: int) -> Iterator[Row]:
    """The rows of both models in float64, for arrays that come by way of a coarser type.

    Args:
      comparison: A comparison whose rows for this seed have been computed.
      data: The data.
      seed: Where they came from.
    """
    for stage, precision in comparison.exact.precisions.items():
        coarse = {
            what: {path for path, eps in arrays.items() if eps > FLOAT32}
            for what, arrays in precision.items()
            if what != AFTER
        }
        if not any(coarse.values()):
            continue
        comparison.tell(stage, "both in float64", seed)
        try:
            runs, model, others = _runs(comparison, stage, data)
        except Exception as error:
            # That of the reference has run before.
            comparison.skipped.append(f"float64 of the model's {stage}: {first_line(error)}")
            continue
        for what, paths in coarse.items():
            mine = {p: x for p, x in runs[0][what].items() if p in paths and _is_clean(x)}
            theirs = _among(mine, comparison.in_reference(what, model.get(what, {})))
            samples: list[Mapping[str, Any]] = [run[what] for run in runs]
            for other in others:
                # How far the model moves, from where the reference is.
                moved = comparison.in_reference(what, other[what])
                samples.append({**mine, **_added(mine, theirs, moved)})
            noise = Noise(mine, {FLOAT32: samples}, dict.fromkeys(mine, FLOAT32))
            for row in comparison.rows_of(what, theirs, mine, noise, seed):
                yield dataclasses.replace(row, route=f"{comparison.route} in float64")


def _runs(
    comparison: Comparison, stage: str, data: Data
) -> tuple[list[Results], Results, list[Results]]:
    """Runs of the reference, the first as it is, and the others moved; the model; it moved."""
    reference, model = comparison.exact, comparison.widened
    runs, found = [reference(stage, data)], model(stage, data)
    with jax.enable_x64(True):
        moved = [perturbed(wide(data), seed, 2 * FLOAT32) for seed in range(SAMPLES)]
    runs += [reference(stage, each) for each in moved]
    constants: Set[Any] = reference.rounded(stage) ^ model.rounded(stage)
    if not constants:
        return runs, found, []

    def with_constants_moved(program: Any) -> list[Results]:
        return [program.moved(stage, data, constants, seed) for seed in range(SAMPLES)]

    return [*runs, *with_constants_moved(reference)], found, with_constants_moved(model)


def _added(mine: Results, theirs: Results, moved: Results) -> Results:
    both = ((p, x) for p, x in theirs.items() if p in moved)
    alike = (p for p, x in both if _is_inexact(x) and np.shape(x) == np.shape(mine[p]))
    return {p: np.asarray(mine[p]) + (np.asarray(moved[p]) - np.asarray(theirs[p])) for p in alike}


def _among(mine: Results, theirs: Results) -> Results:
    return {path: x for path, x in theirs.items() if path in mine}


def _is_clean(x: Any) -> bool:
    """Whether float64 has a value for all of an array."""
    return not _is_inexact(x) or not np.isnan(np.asarray(x)).any()


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
