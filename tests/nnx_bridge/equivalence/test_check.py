"""Linen, and Linen hosted as NNX, against raw JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lifted
from examples.small_model import mlp
from nnx_bridge import Case, CaseError, Verdict, check
from nnx_bridge.host import _frame

X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)


class Module(nn.Module):
    """A module that does what it is given."""

    body: Callable[..., Any]

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def _counts(mdl: nn.Module, x: Any) -> Any:
    n = mdl.param("n", lambda key: jnp.arange(3))
    return nn.Dense(3)(x) * n


def _complex(mdl: nn.Module, x: Any) -> Any:
    return {"z": nn.Dense(2, param_dtype=jnp.complex64)(x + 0j), "n": jnp.arange(3)}


def _keywords(mdl: nn.Module, *, tokens: Any, scale: Any) -> Any:
    return nn.Embed(5, 3)(tokens) * scale["s"], "a string", 2.0


def _boxed(mdl: nn.Module, x: Any) -> Any:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    return nn.BatchNorm(use_running_average=False)(nn.Dense(3, kernel_init=init)(x))


def _sown(mdl: nn.Module, x: Any) -> Any:
    mdl.sow("intermediates", "x", x)
    return nn.Dense(3)(mdl.perturb("p", x))


def _scanned(mdl: nn.Module, x: Any) -> Any:
    def body(layer: nn.Module, x: Any, _: None) -> tuple[Any, None]:
        return jnp.sin(layer(x)), None

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    layers = nn.scan(body, length=3, **axes)
    return layers(nn.remat(nn.Dense)(3), x, None)[0]


@pytest.mark.parametrize(
    "case",
    [
        Case(Module(_counts), (X,), name="integer parameter"),
        Case(Module(_complex), (X,), name="complex"),
        Case(Module(_keywords), (), {"tokens": X.argsort(0), "scale": {"s": X[0]}}, name="keyword"),
        Case(Module(_boxed), (X,), name="boxed"),
        Case(Module(_sown), (X,), mutable=["intermediates"], name="sown"),
        Case(Module(_scanned), (X,), name="scanned"),
        Case(nn.Dense(3, param_dtype=jnp.bfloat16), (X.astype(jnp.bfloat16),), name="bfloat16"),
        Case(nn.LayerNorm(use_bias=False, use_scale=False), (X,), name="no parameters"),
        Case(nn.Embed(5, 3), (X.argsort(0),), name="integer input"),
        Case(nn.Embed(3, 3), (X,), method="attend", variables={"params": {"embedding": X[:3]}}),
        mlp(),
    ],
    ids=lambda case: case.name,
)
def test_all_programs_of_a_module_agree(case: Case) -> None:
    check(case).assert_equal()


def test_everything_is_compared() -> None:
    report = check(mlp())
    assert {row.what for row in report.rows} == {
        "output",
        "state",
        "input gradient",
        "parameter gradient",
        "state after gradient",
        "output tangent",
        "state after jvp",
    }
    assert {row.route for row in report.rows} == {"lifted on Linen", "lifted on NNX"}
    paths = {row.path for row in report.rows if row.what == "parameter gradient"}
    assert "params/Dense_0/kernel" in paths


def test_another_seed_makes_another_problem_with_the_same_verdict() -> None:
    assert check(mlp(), seed=1).agrees


def test_progress_is_told_for_every_step() -> None:
    steps: list[str] = []
    check(Case(nn.Dense(3), (X,)), progress=steps.append)
    assert steps[0] == "initialise"
    assert "jvp: lifted on NNX" in steps


def test_a_module_that_is_another_program_each_time_is_found_out() -> None:
    calls = iter(range(100))
    report = check(Case(Module(lambda mdl, x: nn.Dense(3)(x) * next(calls)), (X,)))
    assert not report.agrees
    assert {row.verdict for row in report.failures} == {Verdict.DIFFERS}


def test_a_host_that_forgets_statistics_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_frame, "write", lambda *args: None)
    failures = check(mlp()).failures
    assert {(row.what, row.route) for row in failures} == {
        ("state", "lifted on NNX"),
        ("state after gradient", "lifted on NNX"),
        ("state after jvp", "lifted on NNX"),
    }


def test_a_gradient_that_is_wrong_in_one_parameter_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def faulty(*args: Any, **kwargs: Any) -> Any:
        grads, *rest = grad(*args, **kwargs)
        if not isinstance(grads, nnx.State):
            grads["params"]["Dense_1"]["bias"] *= 1.001
        return grads, *rest

    grad = lifted.grad
    monkeypatch.setattr(lifted, "grad", faulty)
    (failure,) = check(mlp()).failures
    assert (failure.what, failure.route, failure.path) == (
        "parameter gradient",
        "lifted on Linen",
        "params/Dense_1/bias",
    )


def test_a_transform_that_raises_is_a_failure_of_every_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(lifted, "jvp", broken)
    failures = check(mlp()).failures
    assert {(row.what, row.route) for row in failures} == {
        (what, f"lifted on {kind}")
        for what in ("output tangent", "state after jvp")
        for kind in ("Linen", "NNX")
    }
    assert all(row.error == "NotImplementedError: no forward mode" for row in failures)


def test_what_is_not_a_number_is_named() -> None:
    report = check(Case(Module(lambda mdl, x: {"log": jnp.log(nn.Dense(3)(x) - 9)}), (X,)))
    assert ("output", "log", Verdict.NAN) in {(r.what, r.path, r.verdict) for r in report.rows}


def test_what_has_no_forward_mode_in_jax_is_skipped_and_said() -> None:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return 2 * x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (2 * g,))
    report = check(Case(Module(lambda mdl, x: double(nn.Dense(3)(x))), (X,)))
    assert report.agrees
    assert "jvp, which raw JAX refuses too" in report.skipped[0]


def test_a_model_that_does_not_run_says_where_in_its_code() -> None:
    def body(mdl: nn.Module, x: Any) -> Any:
        return jnp.clip(x, a_wrong_name=0)

    with pytest.raises(CaseError, match=r"a_wrong_name.* \(line \d+ of .*test_check\)"):
        check(Case(Module(body), (X,)))


@pytest.mark.parametrize(
    ("body", "args", "reason"),
    [
        (lambda mdl, x: nn.Dense(3)(x).argmax(-1), (X,), "returns no floating point array"),
        (lambda mdl: jnp.ones(3), (), "neither parameters nor inputs of floating point dtype"),
    ],
    ids=["output", "inputs"],
)
def test_what_has_no_derivatives_is_compared_without_them(
    body: Callable[..., Any], args: Any, reason: str
) -> None:
    report = check(Case(Module(body), args))
    report.assert_equal()
    assert {row.what for row in report.rows} == {"output"}
    (skipped,) = report.skipped
    assert skipped.startswith("derivatives: Module ")
    assert reason in skipped


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(nn.Embed(3, 3), (X,)), "Embed does not initialise: ValueError: Input type must be"),
        (Case(nn.Dense(3), (X,), variables={"params": {}}), "Dense does not run: Scope.*NotFound"),
        (Case(Module(lambda mdl, x: None), (X,)), "returns no array, and there is no collection"),
    ],
    ids=["init", "apply", "output"],
)
def test_a_module_that_cannot_be_checked_says_why(case: Case, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        check(case)
