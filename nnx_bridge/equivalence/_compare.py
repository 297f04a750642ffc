"""A model against its reference, in one call: what tests and notebooks write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import linen as nn
from flax import nnx

from nnx_bridge.equivalence._case import Case
from nnx_bridge.equivalence._check import check
from nnx_bridge.equivalence._report import Report


def compare(
    reference: nn.Module | nnx.Module,
    model: nn.Module | nnx.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: int = 2,
    steps: int = 3,
    optimizer: optax.GradientTransformation | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Compares a model with a reference: a Linen module and its rewrite in NNX, or any two.

    Both get the same variables, the same inputs and the same keys. Compared are outputs; gradients
    of inputs and of every parameter, which are vector-Jacobian products with a random vector; the
    derivative in a random direction; statistics and caches; what each layer gives, and the gradient
    there; and all of it over several steps of training. A model that has a mode is compared in
    training and in prediction. Neither module is changed.

    Each difference is judged against the rounding errors of the reference itself, which is
    evaluated in float64 for it, so there is no tolerance to choose. The report names the first
    module at which the two part.

    Args:
      reference: What is right: a Linen module, not bound, or an NNX module.
      model: What should equal it: an NNX module (a rewrite, a `Host`, a mixture), or a Linen one.
      *args: Inputs: arrays, or pytrees of arrays, for both. `Random` and `jax.ShapeDtypeStruct`
        are drawn anew for every seed and step. Everything else is passed as it is.
      kwargs: Keyword arguments of both calls. An argument that tells the mode (`train`,
        `deterministic`, ...) is set by itself where it is left out, and reaches an NNX module that
        does not have it by `train()` or `eval()`.
      seed: Where parameters, inputs, keys and random directions come from.
      seeds: How many seeds there are, from `seed` on.
      steps: How many steps of training there are.
      optimizer: See `check`.
      progress: Called with what begins.
      **options: What else `Case` takes: `variables`, `correspondence`, `check_values`, `randomize`,
        `rngs`, `mutable`, `method`, `name`.

    Returns:
      A report; `rich.print` shows it, `report.save("report.html")` keeps it.

    Raises:
      CaseError: The reference does not run, there is nothing to compare, or no variable of one
        corresponds to one of the other.

    Example:
        >>> import jax
        >>> from flax import linen as nn, nnx
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> x = jax.ShapeDtypeStruct((2, 4), "float32")
        >>> compare(nn.Dense(3), model, x).agrees
        True
        >>> print(compare(nn.Dense(3, use_bias=False), model, x).parting)
        variable params/bias, Linear: the reference has none; known: params/kernel
    """
    case = Case(reference, args, kwargs or {}, model=model, **options)
    return check(case, seed=seed, seeds=seeds, steps=steps, optimizer=optimizer, progress=progress)


def assert_equivalent(
    reference: nn.Module | nnx.Module, model: nn.Module | nnx.Module, *args: Any, **options: Any
) -> Report:
    """`compare`, for tests: raises AssertionError, with the first place, where the two differ.

    Arguments, results and errors are those of `compare`.

    Example:
        >>> import jax
        >>> from flax import linen as nn, nnx
        >>> x = jax.ShapeDtypeStruct((2, 4), "float32")
        >>> report = assert_equivalent(nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0)), x)
        >>> len(report.failures)
        0
    """
    # A failure is shown where the test called this.
    __tracebackhide__ = True
    report = compare(reference, model, *args, **options)
    report.assert_equal()
    return report
