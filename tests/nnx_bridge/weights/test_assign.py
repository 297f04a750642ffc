"""The assignment problem and its ties."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nnx_bridge.weights._assign import FORBIDDEN, assign


def best(cost: np.ndarray) -> list[tuple[int, ...]]:
    """All assignments of least cost, by trying every one."""
    n = len(cost)
    totals = {p: sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n))}
    least = min(totals.values())
    return [p for p, total in totals.items() if total <= least + 1e-6]


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_what_several_cheapest_assignments_disagree_on_is_ambiguous(n: int, seed: int) -> None:
    # Few different costs make ties likely, also those of three and more that no two share.
    cost = np.random.default_rng(seed).integers(0, 3, (n, n)).astype(float)
    result = assign(cost)
    cheapest = best(cost)
    assert tuple(j for _, j in result.pairs) in cheapest
    undecided = {i for rows, _ in result.ambiguous for i in rows}
    assert undecided == {i for i in range(n) if len({p[i] for p in cheapest}) > 1}


def test_the_candidates_are_those_that_could_be_exchanged() -> None:
    cost = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    assert assign(cost).ambiguous == [([1, 2], [1, 2])]


def test_what_nobody_needs_may_be_a_candidate() -> None:
    assert assign(np.array([[0.3, 0.3, 0.9]])).ambiguous == [([0], [0, 1])]
    assert assign(np.array([[0.3], [0.3], [0.9]])).ambiguous == [([0, 1], [0])]


def test_what_is_forbidden_stays_alone() -> None:
    cost = np.array([[FORBIDDEN, FORBIDDEN], [0.5, FORBIDDEN]])
    assert assign(cost).pairs == [(1, 0)]
    assert assign(cost).ambiguous == []


def test_hardly_any_difference_is_none() -> None:
    assert assign(np.array([[0.0, 0.01], [0.01, 0.0]])).ambiguous
    assert not assign(np.array([[0.0, 0.1], [0.1, 0.0]])).ambiguous
