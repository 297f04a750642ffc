"""Checked drop rates.

A rate becomes one unsigned 32-bit threshold: a weight is kept when a uniform 32-bit word is below
it.  The resolution is therefore 2**-32, and the scale of the kept weights is the reciprocal of the
probability that the threshold really gives, so the expectation of a dropped weight is the weight.
"""

import math
import numbers
from typing import Any

WORD = 2**32


def check_rate(rate: Any, name: str = "rate") -> float:
    """Returns `rate` as a float in [0, 1).

    Raises:
      TypeError: if `rate` is not a real Python or NumPy number.
      ValueError: if it is NaN or outside [0, 1).
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(
            f"{name} must be a real number in [0, 1), got {rate!r} of type "
            f"{type(rate).__name__}; pass a Python float (it is static, never traced)."
        )
    rate = float(rate)
    if math.isnan(rate) or not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1): it is the probability of dropping a weight, got {rate!r}."
        )
    return rate


def check_count(count: Any, name: str) -> int:
    """Returns `count` as an int of at least 1.

    Raises:
      ValueError: if it is not one.
    """
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {count!r}.")
    return int(count)


def keep_threshold(rate: float) -> int:
    """Words below this are kept; never 0 or 2**32, so a positive rate always can do both."""
    return min(max(round((1.0 - rate) * WORD), 1), WORD - 1)
