"""Whether two models compute the same, or one model the same in several ways.

A case with a `model` compares it with the case's module: both run under raw JAX, with the same
variables, inputs and keys, and every difference is judged against the reference in float64. A case
without one compares the Linen module with itself: under `lifted`, and hosted as NNX under `lifted`,
with raw JAX over `module.apply` as the reference.

Both go through the same stages: the call; reverse mode, the gradient of a random combination of the
outputs, which is a vector-Jacobian product with a random vector; forward mode, the derivative in
one random direction of all parameters and inputs; and, with a model, several steps of training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from nnx_bridge.equivalence._case import Case, CaseError
from nnx_bridge.equivalence._correspondence import Correspondence, Paths, arrays_of, unboxed
from nnx_bridge.equivalence._inputs import drawn
from nnx_bridge.equivalence._measures import AFTER, STAGES, Program, Raw, Results, steps, wide
from nnx_bridge.equivalence._parting import VALUE, Parting, find, pairs
from nnx_bridge.equivalence._problem import Data, Problem, failure, first_line, perturbed
from nnx_bridge.equivalence._recording import named
from nnx_bridge.equivalence._report import Report
from nnx_bridge.equivalence._routes import HostedRoute, LinenRoute
from nnx_bridge.equivalence._sides import Arguments, LinenSide, NnxSide, Side
from nnx_bridge.equivalence._verdict import Noise, Row, Verdict, compare_arrays, raised
from nnx_bridge.host._host import check_linen_module

# What serves to find the place of a fault, and is no result of its own.
_UNREPORTED = ("layer input", "layer input gradient", "output with gradient")
_LAYERS = ("layer input", "layer output", "layer input gradient", "layer output gradient")

# How often the reference runs with its data moved by roundings.
_SAMPLES = 2


def check(
    case: Case,
    *,
    seed: int = 0,
    seeds: int = 1,
    steps: int = 3,
    optimizer: optax.GradientTransformation | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compares a module with its rewrite, or with itself under `lifted` and hosted as NNX.

    Args:
      case: The module and one call of it; and the model to compare it with.
      seed: Where parameters, inputs, keys, output weights and directions come from.
      seeds: How many seeds there are, from `seed` on.
      steps: How many steps of training a model is compared over.
      optimizer: What makes the steps; by default `optax.sgd` with momentum. An optimizer that
        divides gradients by their size, such as Adam, makes steps of full length from gradients
        that are nothing but rounding.
      progress: Called with what begins.

    Returns:
      A report with a row for each array of each program.

    Raises:
      CaseError: A module does not run, there is nothing to differentiate, or nothing in one model
        corresponds to the other.

    Example:
        >>> from flax import linen as nn
        >>> report = check(Case(nn.Dense(3), (np.ones((2, 4), np.float32),)))
        >>> report.agrees
        True
    """
    if seeds < 1:
        raise ValueError(f"seeds: at least one is needed, got {seeds}")
    optimizer = optimizer or optax.sgd(0.01, momentum=0.9)
    session = _Session(case, range(seed, seed + seeds), steps, optimizer, progress)
    for training in _modes(case, seed):
        session.run(training)
    versions = {package: version(package) for package in ("flax", "jax")}
    return Report(
        case.name,
        tuple(session.rows.values()),
        tuple(session.seeds),
        versions,
        tuple(dict.fromkeys(session.skipped)),
        session.parting,
        "raw JAX over module.apply" if case.model is None else "",
    )


class _Session:
    """One check, and what it has found so far."""

    def __init__(
        self,
        case: Case,
        seeds: Sequence[int],
        steps: int,
        optimizer: optax.GradientTransformation,
        progress: Callable[[str], None],
    ) -> None:
        self.case, self.seeds, self.steps = case, seeds, steps
        self.optimizer, self.progress = optimizer, progress
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.skipped: list[str] = []
        self.parting: Parting | None = None
        # Those of the first seed, which both modes start from.
        self._variables = case.variables

    def run(self, training: bool | None) -> None:
        """Compares in one mode, for every seed."""
        mode = {None: "", True: "training", False: "prediction"}[training]
        self.progress(f"{mode} initialise".strip())
        problem = Problem.make(self.case, self.seeds[0], training, self._variables)
        self._variables = problem.side.variables
        if self.case.model is None:
            reference = Raw(problem)
            lifted = {"lifted on Linen": LinenRoute(problem), "lifted on NNX": HostedRoute(problem)}
            for seed in self.seeds:
                data = problem.data if seed == self.seeds[0] else problem.drawn(seed)
                self._compare(reference, lifted, data, seed)
            return
        side = _model_side(self.case, problem, self.seeds[0], training)
        correspondence = self._correspond(problem, side)
        reference = Raw(problem, recording=True)
        model = Raw(problem, side, correspondence, recording=True)
        comparison = _Comparison(self, problem, reference, model, correspondence, mode or side.name)
        for seed in self.seeds:
            data = problem.data if seed == self.seeds[0] else problem.drawn(seed)
            rows = comparison.rows(data, seed)
            if seed == self.seeds[0]:
                rows = [*self._values(problem, side, correspondence, comparison.route), *rows]
            results = [row for row in rows if comparison.counts(row)]
            self.add(results)
            if self.parting is None and not all(row.verdict.agrees for row in results):
                paired = comparison.names.values()
                self.parting = find(rows, reference.calls, paired, comparison.route)

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, of which the worst of each array counts."""
        for row in rows:
            key = (row.what, row.route, row.path)
            if _badness(row) >= _badness(self.rows.get(key)):
                self.rows[key] = row

    def _compare(
        self, reference: Raw, routes: Mapping[str, Program], data: Data, seed: int
    ) -> None:
        results = {}
        for stage in STAGES:
            self.progress(f"{stage}: raw JAX")
            try:
                results[stage] = reference(stage, data)
            except Exception as error:
                if stage != "jvp":
                    name = self.case.name
                    raise failure(f"the {stage} of {name} in raw JAX", error) from error
                # A module with a custom_vjp, for one, has no forward mode.
                self.skip(stage, error)
        rows: list[Row] = []
        for route, program in routes.items():
            for stage, expected in results.items():
                self.progress(f"{stage}: {route}")
                rows += _rows(program, route, stage, expected, data, seed)
        order = list(dict.fromkeys(row.what for row in rows))
        self.add(sorted(rows, key=lambda row: order.index(row.what)))

    def skip(self, stage: str, error: Exception) -> None:
        """Notes a stage that the reference itself does not have."""
        self.skipped.append(f"{stage}, which raw JAX refuses too: {first_line(error)}")

    def _correspond(self, problem: Problem, side: Side) -> Correspondence:
        given = self.case.correspondence
        if isinstance(given, Correspondence):
            return given
        reference = unboxed(problem.side.variables)
        paths = Paths(reference, unboxed(side.variables), given)
        if not paths.found_any:
            problems = "; ".join(f"{p.path}: {p.why}" for p in paths.problems[:3])
            raise CaseError(
                f"{self.case.name}: no variable of the reference is one of {side.name}. "
                f"{problems}. Say which stands for which: correspondence={{'Dense_0': 'first'}}"
            )
        return paths

    def _values(
        self, problem: Problem, side: Side, correspondence: Correspondence, route: str
    ) -> Iterator[Row]:
        """Rows for variables without a partner, and for values that are not the reference's."""
        for p in getattr(correspondence, "problems", ()):
            verdict = Verdict.SHAPE if p.misfit else Verdict.UNEXPECTED
            verdict = Verdict.MISSING if p.missing else verdict
            yield Row(VALUE, route, p.path, p.shape, p.dtype, np.nan, np.nan, verdict, p.why)
        given = self.case.variables is not None
        if not (given if self.case.check_values is None else self.case.check_values):
            return
        own = dict(arrays_of(unboxed(side.variables)))
        values = correspondence.to_model(unboxed(problem.side.variables))
        expected = dict(arrays_of(values))
        found = {path: own[path] for path in expected if path in own}
        for row in compare_arrays(VALUE, route, found, expected):
            if row.verdict.agrees:
                yield row
            else:
                why = "the value in the model is not that of the reference; load the weights, or "
                yield dataclasses.replace(row, error=why + "pass check_values=False to ignore it")


@dataclasses.dataclass
class _Comparison:
    """A model beside its reference in one mode."""

    session: _Session
    problem: Problem
    reference: Raw
    model: Raw
    correspondence: Correspondence
    route: str
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    certain: set[str] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def exact(self) -> Any:
        """The reference in float64."""
        return self.reference.exact(self.problem.data)

    def rows(self, data: Data, seed: int) -> list[Row]:
        """The rows for one seed."""
        rows: list[Row] = []
        trained = "call"
        for stage in STAGES:
            self._progress(stage, "reference", seed)
            try:
                expected = self.reference(stage, data)
            except Exception as error:
                if stage == "call":
                    name = self.session.case.name
                    raise failure(f"the {stage} of {name}", error) from error
                self.session.skip(stage, error)
                continue
            trained = "gradient" if stage == "gradient" else trained
            noise = self._noise(stage, expected, data, seed)
            self._progress(stage, "model", seed)
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
            for what, arrays in expected.items():
                if what != AFTER:
                    rows += self._rows(what, found.get(what, {}), arrays, noise[what], seed)
            if any(_unlike(row) for row in rows if row.what == "output"):
                # A random combination of outputs needs outputs of the same shapes.
                return rows
        return rows + list(self._steps(trained, data, seed))

    def _rows(self, what: str, found: Any, expected: Any, noise: Noise, seed: int) -> Iterator[Row]:
        if what in _LAYERS:
            found = named(found, self.names)
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
        if row.what in _UNREPORTED:
            return False
        return row.what not in _LAYERS or row.path.partition(" [")[0] in self.certain

    def _noise(self, stage: str, expected: Results, data: Data, seed: int) -> dict[str, Noise]:
        self._progress(stage, "reference in float64", seed)
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
            self.session.skipped.append(
                f"float64 of the {stage}, so noise is taken from runs that are moved by roundings: "
                f"{first_line(error)}"
            )
            return {}, {}

    def _steps(self, stage: str, data: Data, seed: int) -> Iterator[Row]:
        number = self.session.steps
        if number < 2:
            return
        self._progress(f"{number} steps", "all", seed)

        def run(program: Program, first: Data) -> list[Results]:
            optimizer = self.session.optimizer
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
                yield from self._rows(what, found[i].get(what, {}), arrays, noise, seed)

    def _progress(self, stage: str, program: str, seed: int) -> None:
        self.session.progress(f"{self.route}, seed {seed}, {stage}: {program}")


def _levels(precision: Results) -> set[float]:
    """The machine epsilons in a program; 0 where they are not known."""
    results = {what: arrays for what, arrays in precision.items() if what != AFTER}
    return set(jax.tree.leaves(results)) - {0.0} or {0.0}


def _moved(data: Data, level: float) -> Iterator[Data]:
    return (perturbed(data, seed, level) for seed in range(_SAMPLES))


# Whose precision the results of a step have.
_STEP_OF = {
    "output": "output with gradient",
    "state": "state after gradient",
    "parameter": "parameter gradient",
}


def _rows(
    program: Program, route: str, stage: str, expected: Results, data: Data, seed: int
) -> Iterator[Row]:
    reported = {w: x for w, x in expected.items() if w != AFTER and w not in _UNREPORTED}
    try:
        results = program(stage, data)
    except Exception as error:
        yield from (raised(what, route, error) for what, arrays in reported.items() if arrays)
        return
    for what, arrays in reported.items():
        if what in results:
            yield from compare_arrays(what, route, results[what], arrays, seed=seed)


def _alike(found: Any, expected: Any) -> Any:
    """An input of a layer as its partner gets it: a mask may come unbroadcast, and as integers."""
    if isinstance(found, jax.Array) and np.shape(found) != np.shape(expected):
        try:
            found = np.broadcast_to(np.asarray(found), np.shape(expected))
        except ValueError:
            return found
    exact = any(not jnp.issubdtype(x.dtype, jnp.inexact) for x in (found, expected))
    keys = any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in (found, expected))
    return np.asarray(found).astype(expected.dtype) if exact and not keys else found


def _unlike(row: Row) -> bool:
    missing = row.verdict in (Verdict.MISSING, Verdict.UNEXPECTED)
    return missing or row.verdict is Verdict.SHAPE


def _badness(row: Row | None) -> tuple[bool, float]:
    if row is None:
        return (False, -1.0)
    return (not row.verdict.agrees, -1.0 if np.isnan(row.max_roundings) else row.max_roundings)


def _model_side(case: Case, problem: Problem, seed: int, training: bool | None) -> Side:
    arguments = _call(case, seed)
    if isinstance(case.model, nnx.Module):
        return NnxSide(case.model, case.method).in_mode(training, arguments)
    # Its own variables are those of the same seed.
    module = check_linen_module(case.model)
    of_model = Case(module, case.args, case.kwargs, method=case.method, rngs=case.rngs)
    side = Problem.make(of_model, seed, training).side
    return dataclasses.replace(side, mutable=problem.mutable)  # type: ignore[type-var]


def _modes(case: Case, seed: int) -> list[bool | None]:
    """Training, prediction, both, or None: as the models are."""
    if case.model is None:
        return [None]
    arguments = _call(case, seed)
    sides = [_bare(module, case) for module in (case.module, case.model)]
    given = [mode for mode in (side.own_mode(arguments) for side in sides) if mode is not None]
    if given:
        return [given[0]]
    # A reference that is the same in both is compared with the model as it is.
    return [False, True] if sides[0].has_mode(arguments) else [None]


def _bare(module: Any, case: Case) -> Side:
    """A side without variables, which is enough to see its signature."""
    if isinstance(module, nn.Module):
        return LinenSide(module, {}, False, case.method)
    return NnxSide(module, case.method)


def _call(case: Case, seed: int) -> Arguments:
    return Arguments(**drawn({"args": case.args, "kwargs": dict(case.kwargs)}, seed))
