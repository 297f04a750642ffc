"""A model beside its reference: every stage of both, and the noise of the reference."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnx_bridge.equivalence._calls import PARTS
from nnx_bridge.equivalence._case import CaseError
from nnx_bridge.equivalence._correspondence import Correspondence, Paths
from nnx_bridge.equivalence._measures import AFTER, Program, Raw, Results, steps, wide
from nnx_bridge.equivalence._parting import pairs, path_of, sown_pairs
from nnx_bridge.equivalence._problem import Data, Problem, failure, first_line, perturbed
from nnx_bridge.equivalence._recording import named
from nnx_bridge.equivalence._verdict import Noise, Row, Verdict, compare_arrays, raised

# What serves to find the place of a fault, and is no result of its own.
UNREPORTED = ("layer input", "layer input gradient", "output with gradient")
_LAYERS = ("layer input", "layer output", "layer input gradient", "layer output gradient")

SOWN = PARTS["sown"]

# How often the reference runs with its data moved by roundings.
SAMPLES = 2


@dataclasses.dataclass
class Comparison:
    """A model beside its reference in one mode.

    Attributes:
      problem: The problem.
      reference: The program of the reference, which records.
      model: The program of the model, which does too.
      correspondence: How the variables of the one become those of the other.
      route: What the rows say of it.
      steps: How many steps of training there are.
      optimizer: What makes them.
      progress: Called with what begins.
      skipped: What the reference itself cannot do.
      names: The calls of the model by those of the reference that they stand for.
      certain: The calls of the reference whose partner has the same path.
      sown: What the model sows by what the reference sows under the same path and name.
    """

    problem: Problem
    reference: Raw
    model: Raw
    correspondence: Correspondence
    route: str
    steps: int
    optimizer: optax.GradientTransformation
    progress: Callable[[str], None]
    skipped: list[str] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    certain: set[str] = dataclasses.field(default_factory=set)
    sown: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def exact(self) -> Any:
        """The reference in float64."""
        return self.reference.exact(self.problem.data)

    @functools.cached_property
    def widened(self) -> Any:
        """The model in float64."""
        return self.model.exact(self.problem.data)

    def rows(self, data: Data, seed: int) -> list[Row]:
        """The rows for one seed."""
        rows: list[Row] = []
        trained = "call"
        for stage in self.problem.stages:
            self.tell(stage, "reference", seed)
            try:
                expected = self.reference(stage, data)
            except Exception as error:
                if stage == "call":
                    name = self.problem.case.name
                    raise failure(f"the {stage} of {name}", error) from error
                self.skipped.append(skipped(stage, error))
                continue
            self._check_names()
            trained = "gradient" if stage == "gradient" else trained
            noise = self._noise(stage, expected, data, seed)
            self.tell(stage, "model", seed)
            try:
                found = self.model(stage, data)
            except Exception as error:
                path = self.correspondence.module(self.model.failed or "")
                return [
                    *rows,
                    dataclasses.replace(raised(stage, self.route, error, path), seed=seed),
                ]
            if not self.names:
                calls = self.reference.calls, self.model.calls
                self.names, self.certain = pairs(*calls, self.correspondence)
                self._pair_sown()
            for what, arrays in expected.items():
                if what != AFTER:
                    theirs = self.in_reference(what, found.get(what, {}))
                    rows += self.rows_of(what, theirs, arrays, noise[what], seed)
            if any(_unlike(row) for row in rows if row.what == "output"):
                # A random combination of outputs needs outputs of the same shapes.
                return rows
        return rows + list(self._steps(trained, data, seed))

    def _check_names(self) -> None:
        if isinstance(self.correspondence, Paths):
            unused = list(self.correspondence.unused(map(path_of, self.reference.calls)))
            if unused:
                raise CaseError(f"{self.problem.case.name}: {'; '.join(unused)}")

    def _pair_sown(self) -> None:
        """Pairs what is sown. A rewrite need not sow what nobody reads; but it is said."""
        self.sown = sown_pairs(self.reference.sown, self.model.sown, self.correspondence)
        paired = set(self.sown.values())
        alone = {re.sub(r" \(.*", "", name) for name in self.reference.sown if name not in paired}
        if alone:
            names = ", ".join(sorted(alone))
            self.skipped.append(f"sown values that the model does not sow: {names}")

    def in_reference(self, what: str, arrays: Results) -> Results:
        """What the model gave, by the names of calls in the reference; without those it has not."""
        if what == SOWN:
            return named(arrays, self.sown)
        return named(arrays, self.names) if what in _LAYERS else arrays

    def rows_of(
        self, what: str, found: Any, expected: Any, noise: Noise, seed: int
    ) -> Iterator[Row]:
        """Rows for arrays of one kind, of which those of the model have the reference's names."""
        if what == SOWN:
            expected = {key: x for key, x in expected.items() if key in found}
            found = {key: found[key] for key in expected}
        if what in _LAYERS:
            order = {name: i for i, name in enumerate(self.reference.calls)}
            paired = set(self.names.values())
            keys = sorted(
                (key for key in expected if key.partition(" [")[0] in paired),
                key=lambda key: order[key.partition(" [")[0]],
            )
            # A layer may give more than its partner; what both give is compared.
            expected = {key: expected[key] for key in keys if key in found}
            found = {key: found[key] for key in expected}
        if what == "layer input gradient":
            # Of a mask that is broadcast the gradient has another shape.
            same = [key for key, x in expected.items() if np.shape(x) == np.shape(found[key])]
            expected = {key: expected[key] for key in same}
            found = {key: found[key] for key in same}
        if what == "layer input":
            found = {key: _alike(found[key], x) for key, x in expected.items()}
        yield from compare_arrays(what, self.route, found, expected, noise, seed)

    def counts(self, row: Row) -> bool:
        """Whether a row is a result: that of a layer is one if its partner is beyond doubt."""
        if row.what in UNREPORTED:
            return False
        return row.what not in _LAYERS or row.path.partition(" [")[0] in self.certain

    def _noise(self, stage: str, expected: Results, data: Data, seed: int) -> dict[str, Noise]:
        self.tell(stage, "reference in float64", seed)
        exact, precision = self._exact(stage, data)
        samples = {
            level: [self.reference(stage, moved) for moved in _moved(data, level)]
            for level in _levels(precision)
        }
        return {
            what: Noise(
                exact.get(what, {}),
                {level: [run[what] for run in runs] for level, runs in samples.items()},
                precision.get(what, {}),
            )
            for what in expected
            if what != AFTER
        }

    def _exact(self, stage: str, data: Data) -> tuple[Results, Results]:
        try:
            return self.exact(stage, data), self.exact.precisions[stage]
        except Exception as error:
            self.skipped.append(
                f"float64 of the {stage}, so noise is taken from runs that are moved by roundings: "
                f"{first_line(error)}"
            )
            return {}, {}

    def _steps(self, stage: str, data: Data, seed: int) -> Iterator[Row]:
        number = self.steps
        if number < 2:
            return
        self.tell(f"{number} steps", "all", seed)

        def run(program: Program, first: Data) -> list[Results]:
            optimizer = self.optimizer
            return list(steps(program, first, self.problem, seed, number, optimizer, stage))

        expected, found = run(self.reference, data), run(self.model, data)
        precision = self.exact.precisions.get(stage, {})
        samples = {
            level: [run(self.reference, moved) for moved in _moved(data, level)]
            for level in _levels(precision)
        }
        exact: list[Results] = [{} for _ in expected]
        if stage in self.exact.precisions:
            with jax.enable_x64(True):
                exact = run(self.exact, wide(data))
        for i, results in enumerate(expected):
            for what, arrays in results.items():
                eps = precision.get(_STEP_OF[what.partition(",")[0]], {})
                moved = {level: [r[i][what] for r in runs] for level, runs in samples.items()}
                noise = Noise(exact[i].get(what, {}), moved, eps)
                yield from self.rows_of(what, found[i].get(what, {}), arrays, noise, seed)

    def tell(self, stage: str, program: str, seed: int) -> None:
        """Says what begins."""
        self.progress(f"{self.route}, seed {seed}, {stage}: {program}")


def _levels(precision: Results) -> set[float]:
    """The machine epsilons in a program; 0 where they are not known."""
    results = {what: arrays for what, arrays in precision.items() if what != AFTER}
    return set(jax.tree.leaves(results)) - {0.0} or {0.0}


def _moved(data: Data, level: float) -> Iterator[Data]:
    return (perturbed(data, seed, level) for seed in range(SAMPLES))


# Whose precision the results of a step have.
_STEP_OF = {
    "output": "output with gradient",
    "state": "state after gradient",
    "parameter": "parameter gradient",
}


def skipped(stage: str, error: Exception) -> str:
    """The note that the reference itself does not have a stage."""
    return f"{stage}, which raw JAX refuses too: {first_line(error)}"


def _unlike(row: Row) -> bool:
    missing = row.verdict in (Verdict.MISSING, Verdict.UNEXPECTED)
    return missing or row.verdict is Verdict.SHAPE


def _alike(found: Any, expected: Any) -> Any:
    """An input of a layer as its partner gets it: a mask may come unbroadcast, and as integers."""
    if hasattr(found, "shape") and np.shape(found) != np.shape(expected):
        try:
            found = np.broadcast_to(np.asarray(found), np.shape(expected))
        except ValueError:
            return found
    exact = any(not jnp.issubdtype(x.dtype, jnp.inexact) for x in (found, expected))
    keys = any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (found, expected))
    return np.asarray(found).astype(expected.dtype) if exact and not keys else found
