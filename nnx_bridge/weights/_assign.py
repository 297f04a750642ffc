"""The assignment problem: who belongs to whom where all are alike, and where nobody can tell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

# What cannot be assigned to each other; finite, so that the solver always finds some assignment.
FORBIDDEN = 1e4
# An exchange that costs no more than this much for each row could as well be made.
_TIE = 0.02
# What is lost in sums of numbers as large as `FORBIDDEN`.
_ROUNDING = 1e-9


class Assignment(NamedTuple):
    """The cheapest assignment.

    Attributes:
      pairs: Rows and columns that belong together.
      ambiguous: Groups of rows and columns that can be exchanged at hardly any cost.
    """

    pairs: list[tuple[int, int]]
    ambiguous: list[tuple[list[int], list[int]]]


def assign(cost: np.ndarray) -> Assignment:
    """Assigns rows to columns so that the sum of the costs is least.

    Args:
      cost: `[n, m]`; `FORBIDDEN` for what must not be assigned. With `n != m` the rest stays alone.

    Example:
        >>> assign(np.array([[0.0, 1.0], [1.0, 0.0]])).pairs
        [(0, 0), (1, 1)]
        >>> assign(np.zeros((2, 2))).ambiguous
        [([0, 1], [0, 1])]
    """
    n, m = cost.shape
    size = max(n, m)
    square = np.full((size, size), FORBIDDEN)
    square[:n, :m] = cost
    rows, columns = linear_sum_assignment(square)
    # Exchanging the column of i for that of k: what it costs.
    change = square[:, columns] - square[rows, columns][:, None]
    pairs = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if _may(square, i, j)]
    free, groups = _ties(change)
    ambiguous = []
    for group in groups:
        real = [i for i in group if i < n and columns[i] < m and _may(square, i, columns[i])]
        # What stays alone could as well have had the partner of another.
        left = [i for i in group if i < n and i not in real and free[i, real].any()]
        over = [k for k in group if columns[k] < m and k not in real and free[real, k].any()]
        ours = sorted(int(i) for i in (*real, *left))
        theirs = sorted(int(columns[k]) for k in (*real, *over))
        if real and len(ours) + len(theirs) > 2:
            ambiguous.append((ours, theirs))
    return Assignment(pairs, ambiguous)


def _may(square: np.ndarray, i: int, j: int) -> bool:
    return bool(square[i, j] < FORBIDDEN)


def _ties(change: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Exchanges that are free, and rows that can exchange their columns around a circle of them.

    The exchanges are a graph without negative circles, for the assignment is the cheapest. With the
    lengths of shortest paths as potentials no edge is negative, and the cheap circles are those of
    edges of hardly any length.
    """
    potential = np.zeros(len(change))
    for _ in range(len(change)):
        shorter = np.minimum(potential, (potential[:, None] + change).min(axis=0))
        if np.allclose(shorter, potential, rtol=0, atol=_ROUNDING):
            break
        potential = shorter
    free = change + potential[:, None] - potential[None, :] <= _TIE
    _, labels = connected_components(free, directed=True, connection="strong")
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return free, [group for group in groups if len(group) > 1]
