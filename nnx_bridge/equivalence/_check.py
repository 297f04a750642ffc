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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from nnx_bridge.equivalence._case import Case, CaseError
from nnx_bridge.equivalence._comparison import UNREPORTED, Comparison, skipped
from nnx_bridge.equivalence._correspondence import Correspondence, Paths, arrays_of, unboxed
from nnx_bridge.equivalence._inputs import drawn
from nnx_bridge.equivalence._measures import AFTER, Program, Raw, Results
from nnx_bridge.equivalence._parting import VALUE, Parting, find
from nnx_bridge.equivalence._planned import Planned
from nnx_bridge.equivalence._problem import Data, Problem, failure
from nnx_bridge.equivalence._report import Report
from nnx_bridge.equivalence._routes import HostedRoute, LinenRoute
from nnx_bridge.equivalence._sides import Arguments, LinenSide, NnxSide, Side
from nnx_bridge.equivalence._verdict import Row, Verdict, compare_arrays, raised
from nnx_bridge.equivalence._widened import widened_rows
from nnx_bridge.host import check_linen_module
from nnx_bridge.weights import Plan, WeightsError
from nnx_bridge.weights._leaves import OPTIONAL

_SGD = optax.sgd(0.01, momentum=0.9)


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
      CaseError: A module does not run, there is nothing to compare, or nothing in one model
        corresponds to the other.

    Example:
        >>> from flax import linen as nn
        >>> report = check(Case(nn.Dense(3), (np.ones((2, 4), np.float32),)))
        >>> report.agrees
        True
    """
    if seeds < 1:
        raise ValueError(f"seeds: at least one is needed, got {seeds}")
    session = _Session(case, range(seed, seed + seeds), steps, optimizer or _SGD, progress)
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
        if problem.underivable:
            self.skipped.append(f"derivatives: {problem.underivable}")
        if self.case.model is None:
            lifted = {"lifted on Linen": LinenRoute(problem), "lifted on NNX": HostedRoute(problem)}
            for seed in self.seeds:
                data = problem.data if seed == self.seeds[0] else problem.drawn(seed)
                self._compare(problem, lifted, data, seed)
            self.skipped += sorted(problem.uncompared)
            return
        side = _model_side(self.case, problem, self.seeds[0], training)
        correspondence = self._correspond(problem, side)
        reference = Raw(problem, recording=True)
        model = Raw(problem, side, correspondence, recording=True)
        comparison = Comparison(
            problem,
            reference,
            model,
            correspondence,
            mode or side.name,
            self.steps,
            self.optimizer,
            self.progress,
            self.skipped,
        )
        for seed in self.seeds:
            data = problem.data if seed == self.seeds[0] else problem.drawn(seed)
            rows = comparison.rows(data, seed)
            if seed == self.seeds[0]:
                rows = [*self._values(problem, side, correspondence, comparison.route), *rows]
            results = [row for row in rows if comparison.counts(row)]
            route = comparison.route
            if all(row.verdict.agrees for row in results):
                rows = list(widened_rows(comparison, data, seed))
                results += [row for row in rows if comparison.counts(row)]
                route = rows[0].route if rows else route
            self.add(results)
            if self.parting is None and not all(row.verdict.agrees for row in results):
                paired = comparison.names.values()
                self.parting = find(rows, reference.calls, paired, route)
        self.skipped += sorted(problem.uncompared)

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, of which the worst of each array counts."""
        for row in rows:
            key = (row.what, row.route, row.path)
            if _badness(row) >= _badness(self.rows.get(key)):
                self.rows[key] = row

    def _compare(
        self, problem: Problem, routes: Mapping[str, Program], data: Data, seed: int
    ) -> None:
        reference, results = Raw(problem), {}
        for stage in problem.stages:
            self.progress(f"{stage}: raw JAX")
            try:
                results[stage] = reference(stage, data)
            except Exception as error:
                if stage != "jvp":
                    name = self.case.name
                    raise failure(f"the {stage} of {name} in raw JAX", error) from error
                # A module with a custom_vjp, for one, has no forward mode.
                self.skipped.append(skipped(stage, error))
        rows: list[Row] = []
        for route, program in routes.items():
            for stage, expected in results.items():
                self.progress(f"{stage}: {route}")
                rows += _rows(program, route, stage, expected, data, seed)
        order = list(dict.fromkeys(row.what for row in rows))
        self.add(sorted(rows, key=lambda row: order.index(row.what)))

    def _correspond(self, problem: Problem, side: Side) -> Correspondence:
        given = self.case.correspondence
        if isinstance(given, Plan):
            return _planned(self.case, given, problem, side)
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


def _rows(
    program: Program, route: str, stage: str, expected: Results, data: Data, seed: int
) -> Iterator[Row]:
    reported = {w: x for w, x in expected.items() if w != AFTER and w not in UNREPORTED}
    try:
        results = program(stage, data)
    except Exception as error:
        yield from (raised(what, route, error) for what, arrays in reported.items() if arrays)
        return
    for what, arrays in reported.items():
        if what in results:
            yield from compare_arrays(what, route, results[what], arrays, seed=seed)


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


def _planned(case: Case, plan: Plan, problem: Problem, side: Side) -> Correspondence:
    if not isinstance(side, NnxSide):
        raise CaseError(f"{case.name}: a plan leads to an NNX module, and {side.name} is none")
    try:
        plan.check()
        plan.check_models(problem.side.variables, case.model, but=OPTIONAL)
    except WeightsError as error:
        raise CaseError(f"{case.name}: {error}") from error
    return Planned(plan, side.places)


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
