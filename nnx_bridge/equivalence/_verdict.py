"""When two arrays count as equal: the rule, and the row that it gives.

Two programs that compute the same differ by rounding, and how much rounding is right depends on
the place: it grows along a network, and cancellation makes it large beside small results. So it is
measured. The reference is also evaluated in float64 (`_exact.py`), and its distance from there is
the *noise* of the reference. Two more runs of the reference, with every parameter and input moved
by one rounding or none, show where rounding carries further than in the one run that happened; the
largest of the three distances counts.

Noise is a matter of luck: some elements of the reference hit the exact value, so one element alone
says little. Elements within a factor of `_DECADES` of each other share the largest noise among
them. Others do not share it: a logit that is masked with -1e9 has errors of 100, and they must not
hide a fault in its neighbours. No noise is taken to be smaller than half a rounding of the largest
element of its group, in the *precision* of the place: the coarsest dtype on the way to it, whatever
the dtype of the result. Elements that are exactly zero have no size of their own. They are measured
with the smallest group beside them, or, where a whole array is zero, with the largest array of the
same kind: a gradient that is zero in one program and 1e-9 beside gradients of 1 in another is no
fault, and one of 1e-3 is.

The verdict: the *model* too is compared with float64, not with the reference, and the distance may
be `TOLERANCE` times the noise. The factor leaves room for another order of summation, which moves
results by a few times the noise; faults move them by orders of magnitude. Integers, booleans and
keys must be equal, and so must shapes and dtypes. What is not a number never counts as equal.

Where there is no float64 (programs that are the same, up to the fusions of XLA), noise is one
rounding of the largest element, and twice as many roundings are allowed.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 8.0

# Elements whose sizes differ by more have noise of their own.
_DECADES = 1000.0

# How many of its worst elements a row shows.
_WORST = 4


class Verdict(enum.Enum):
    """How an array compares with its reference."""

    EQUAL = "equal"
    ROUNDING = "equal up to rounding"
    DIFFERS = "differs"
    NAN = "not a number"
    MISSING = "missing"
    UNEXPECTED = "unexpected"
    SHAPE = "other shape"
    DTYPE = "other dtype"
    RAISED = "raised an error"

    @property
    def agrees(self) -> bool:
        """Whether the arrays count as equal."""
        return self in (Verdict.EQUAL, Verdict.ROUNDING)


@dataclasses.dataclass(frozen=True)
class Element:
    """One element of an array that differs.

    Attributes:
      index: Where it is in the array.
      actual: What the model has.
      reference: What the reference has.
      exact: What the reference has in float64.
    """

    index: tuple[int, ...]
    actual: float
    reference: float
    exact: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of one program beside the same array of the reference; or why there is none.

    Attributes:
      what: What the array is, such as "parameter gradient".
      route: The program that computed it.
      path: Its path, such as `params/Dense_0/kernel`.
      shape: Its shape.
      dtype: Its dtype.
      max_error: The largest absolute difference; NaN where there is nothing to subtract.
      max_roundings: The largest multiple of the noise by which an element is off; infinite for any
        difference of integers.
      verdict: Whether it counts as equal, and if not, why.
      error: What was raised, or other details of the verdict.
      noise: The largest error of the reference itself, against float64; NaN where it is not known.
      seed: The seed for which this was found, the worst of all.
      worst: The elements that are off by most, worst first.
    """

    what: str
    route: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    max_error: float
    max_roundings: float
    verdict: Verdict
    error: str = ""
    noise: float = math.nan
    seed: int = 0
    worst: tuple[Element, ...] = ()


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is known of the rounding errors of the reference, for arrays of one kind.

    Attributes:
      exact: The arrays in float64.
      samples: The arrays of further runs of the reference, each moved by roundings, by the machine
        epsilon of these.
      precision: The machine epsilon behind each array.
    """

    exact: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[float, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    precision: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def runs(self, path: str) -> list[Any]:
        """An array in the runs whose data was moved by what is rounded on the way to it.

        A run that took another branch does not have it.
        """
        runs = self.samples.get(self.precision.get(path, 0.0), ())
        return [run[path] for run in runs if path in run]


def compare_arrays(
    what: str,
    route: str,
    actual: Mapping[str, Any],
    reference: Mapping[str, Any],
    noise: Noise | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """A row for each array that either side has.

    Args:
      what: What the arrays are, such as "output".
      route: Which program computed `actual`.
      actual: Arrays by path.
      reference: The arrays that they should equal.
      noise: What is known of the errors of the reference; None for programs that are the same.
      seed: The seed of the data.
    """
    sizes = [np.abs(_finite(_wide(x))).max(initial=0) for x in reference.values() if _inexact(x)]
    scale = float(max(sizes, default=0.0))
    for path in dict.fromkeys([*reference, *actual]):
        found, expected = actual.get(path), reference.get(path)
        shown: Any = found if expected is None else expected
        row = Row(
            what, route, path, np.shape(shown), str(shown.dtype), math.nan, math.nan, Verdict.EQUAL
        )
        yield dataclasses.replace(row, seed=seed, **_compare(path, found, expected, noise, scale))


def raised(what: str, route: str, error: Exception, where: str = "-") -> Row:
    """The row of a program that raised where the reference did not."""
    message = f"{type(error).__name__}: {error}"
    return Row(what, route, where, (), "-", math.nan, math.nan, Verdict.RAISED, message)


def _compare(path: str, actual: Any, reference: Any, noise: Noise | None, scale: float) -> Any:
    if actual is None or reference is None:
        return {"verdict": Verdict.MISSING if actual is None else Verdict.UNEXPECTED}
    if actual.shape != reference.shape or actual.dtype != reference.dtype:
        came = f"{actual.dtype}{list(actual.shape)} in the place of "
        came += f"{reference.dtype}{list(reference.shape)}"
        other = Verdict.DTYPE if actual.shape == reference.shape else Verdict.SHAPE
        return {"verdict": other, "error": came}
    inexact = _inexact(reference)
    eps = float(jnp.finfo(reference.dtype).eps) if inexact else 0.0
    found, wanted = _wide(actual), _wide(reference)
    if inexact and (np.isnan(found).any() or np.isnan(wanted).any()):
        return {"verdict": Verdict.NAN, "error": _not_a_number(found, wanted)}
    same = np.asarray(found == wanted)
    if same.all():
        return {"max_error": 0.0, "max_roundings": 0.0, "verdict": Verdict.EQUAL}
    if not inexact:
        error = float(np.abs(found - wanted).max())
        return {"max_error": error, "max_roundings": math.inf, "verdict": Verdict.DIFFERS}
    exact, samples = wanted, [wanted]
    if noise is not None:
        exact = _wide(noise.exact.get(path, wanted))
        samples = [wanted, *map(_wide, noise.runs(path))]
        eps = max(eps, noise.precision.get(path, 0.0)) / (2 if path in noise.exact else 1)
    with np.errstate(all="ignore"):
        # Equal elements count as such, wherever float64 is.
        off = np.where(same, 0.0, np.abs(found - exact))
        own = np.max([np.abs(sample - exact) for sample in samples], axis=0)
        unit = _unit(np.abs(exact), _finite(own), eps, scale)
        multiples = np.where(off > 0, off / unit, 0.0)
    worst = float(np.nan_to_num(multiples, nan=math.inf, posinf=math.inf).max())
    allowed = TOLERANCE if noise is not None else 2 * TOLERANCE
    known = noise is not None and path in noise.exact
    return {
        "max_error": float(np.abs(found - wanted)[~same].max()),
        "max_roundings": worst,
        "verdict": Verdict.ROUNDING if worst <= allowed else Verdict.DIFFERS,
        "noise": float(_finite(np.abs(wanted - exact)).max()) if known else math.nan,
        "worst": _worst(multiples, found, wanted, exact),
    }


def _unit(sizes: Any, noise: Any, eps: float, scale: float) -> Any:
    """The noise that each element is measured with, see the top of this file."""
    unit = np.full(sizes.shape, eps * scale)
    finite = np.isfinite(sizes) & (sizes > 0)
    if finite.any():
        group = np.full(sizes.shape, -1)
        largest = sizes[finite].max()
        group[finite] = (np.log(largest / sizes[finite]) / math.log(_DECADES)).astype(int)
        for g in np.unique(group[finite]):
            members = group == g
            unit[members] = max(noise[members].max(), eps * sizes[members].max())
        # What is zero, or infinite, beside the smallest of the others.
        unit[~finite] = eps * sizes[members].max()
    if (~finite).any():
        unit[~finite] = np.maximum(unit[~finite], noise[~finite].max())
    return unit


def _worst(multiples: Any, found: Any, wanted: Any, exact: Any) -> tuple[Element, ...]:
    flat = np.nan_to_num(multiples, nan=math.inf, posinf=math.inf).ravel()
    order = np.argsort(-flat, kind="stable")[:_WORST]
    places = [tuple(map(int, np.unravel_index(i, multiples.shape))) for i in order if flat[i] > 0]
    return tuple(Element(i, *(_number(x[i]) for x in (found, wanted, exact))) for i in places)


def _number(x: Any) -> float:
    return float(x.real)


def _inexact(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _finite(values: Any) -> Any:
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _not_a_number(found: Any, wanted: Any) -> str:
    here, there = (int(np.isnan(x).sum()) for x in (found, wanted))
    first = tuple(map(int, np.argwhere(np.isnan(found) | np.isnan(wanted))[0]))
    counts = f"{here} of {found.size} values are no numbers, and {there} in the reference"
    return f"{counts}; the first at {first}"


def _wide(array: Any) -> np.ndarray[Any, Any]:
    """The values in a type that holds those of every narrower one."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    values = np.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return values.astype(np.complex128)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return values.astype(np.float64)
    # Differences of Python integers neither wrap around nor lose digits.
    return values.astype(object)
