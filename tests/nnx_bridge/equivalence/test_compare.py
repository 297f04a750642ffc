"""Equal models count as equal, whatever their dtypes; and what else `compare` promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import CaseError, Host, Random, assert_equivalent, compare, load
from nnx_bridge.equivalence._exact import Exact
from tests.nnx_bridge.equivalence import models as m

X = jax.ShapeDtypeStruct((6, 4), "float32")
TOKENS = Random((2, 5), "int32", high=11)
SEQUENCE = jax.ShapeDtypeStruct((2, 4, 3), "float32")
BF16 = jnp.bfloat16


@pytest.mark.parametrize(
    ("reference", "model", "inputs"),
    [
        (m.Mlp(), m.MlpRewrite(nnx.Rngs(0)), X),
        (m.Mlp(BF16), m.MlpRewrite(nnx.Rngs(0), dtype=BF16), X),
        (m.Text(), m.TextRewrite(nnx.Rngs(0)), TOKENS),
        (m.Text(BF16), m.TextRewrite(nnx.Rngs(0), dtype=BF16), TOKENS),
        (m.Sequence(), m.SequenceRewrite(nnx.Rngs(0)), SEQUENCE),
        (m.Memory(), m.MemoryRewrite(nnx.Rngs(0)), jax.ShapeDtypeStruct((4, 3), "float32")),
    ],
    ids=["float32", "mixed", "attention", "attention in bfloat16", "scanned", "memory"],
)
def test_a_right_rewrite_is_equal(reference: Any, model: Any, inputs: Any) -> None:
    report = assert_equivalent(reference, model, inputs)
    assert report.parting is None
    assert {"output", "parameter gradient", "output tangent", "output, step 3"} <= {
        row.what for row in report.rows
    }


def test_another_algorithm_for_the_same_numbers_is_equal() -> None:
    class Split(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            halves = zip(jnp.split(x, 2, -1), jnp.split(self.kernel[...], 2), strict=True)
            return self.bias[...] + sum(x @ kernel for x, kernel in halves)

    x = jax.ShapeDtypeStruct((4, 64), "float32")
    report = assert_equivalent(nn.Dense(3), Split(64, 3, rngs=nnx.Rngs(0)), x)
    assert any(row.max_roundings > 0 for row in report.rows)


def test_a_hosted_model_equals_its_module_in_training_and_in_prediction() -> None:
    x = jnp.ones((6, 4))
    variables = m.Mlp().init(jax.random.key(0), x, train=False)
    report = assert_equivalent(m.Mlp(), Host(m.Mlp(), variables), X, variables=variables, seeds=1)
    assert {row.route for row in report.rows} == {"prediction", "training"}
    assert all(row.max_roundings == 0 for row in report.rows)


def test_names_that_differ_are_told_by_a_dict_or_a_function() -> None:
    class Renamed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(nnx.relu(self.first(x)))

    class Original(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(nn.Dense(3)(x))
            return nn.Dense(2)(x)

    names = {"Dense_0": "first", "Dense_1": "second"}
    x = jax.ShapeDtypeStruct((2, 3), "float32")
    for given in (
        names,
        lambda path: path.replace("Dense_0", "first").replace("Dense_1", "second"),
    ):
        report = assert_equivalent(
            Original(), Renamed(nnx.Rngs(0)), x, correspondence=given, seeds=1, steps=1
        )
        assert {row.path for row in report.rows if row.what == "layer output"} == {
            "", "Dense_0", "Dense_1",
        }  # fmt: skip


def test_a_plan_may_change_the_layout_and_gradients_are_those_of_the_reference() -> None:
    class Rows(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.zeros((2, 3)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.weight[...].T

    class Plan:
        def to_model(self, variables: Any) -> Any:
            return {"params": {"weight": variables["params"]["kernel"].T}}

        def to_reference(self, variables: Any) -> Any:
            return {}

        def module(self, path: str) -> str:
            return path

    x = jax.ShapeDtypeStruct((4, 3), "float32")
    reference = nn.Dense(2, use_bias=False)
    report = assert_equivalent(reference, Rows(), x, correspondence=Plan(), seeds=1)
    (row,) = (row for row in report.rows if row.what == "parameter gradient")
    assert (row.path, row.shape) == ("params/kernel", (3, 2))


def test_two_models_of_one_kind_are_compared() -> None:
    x = jax.ShapeDtypeStruct((2, 4), "float32")
    assert_equivalent(nn.Dense(3), nn.Dense(3), x, seeds=1)
    first, second = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    assert_equivalent(first, second, x, seeds=1)


class Perturbed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.perturb("h", nn.Dense(3)(x)) ** 2


class PerturbedRewrite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.Dense_0 = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.Dense_0(x) ** 2


@pytest.mark.parametrize("by_plan", [False, True])
def test_perturbations_are_no_variables_that_a_rewrite_must_have(by_plan: bool) -> None:
    x, model = jnp.ones((2, 4)), PerturbedRewrite(nnx.Rngs(0))
    variables = Perturbed().init(jax.random.key(0), x)
    assert "perturbations" in variables
    plan = load(model, variables) if by_plan else None
    assert_equivalent(Perturbed(), model, x, correspondence=plan, seeds=1, steps=1)


def test_the_callers_model_is_left_as_it_was() -> None:
    model = m.MlpRewrite(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    classes = [type(module) for _, module in nnx.iter_modules(model)]
    compare(m.Mlp(), model, X, seeds=1, steps=1, kwargs={"train": True})
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert [type(module) for _, module in nnx.iter_modules(model)] == classes
    assert not model.Dropout_0.deterministic


def test_an_optimizer_of_the_user_makes_the_steps() -> None:
    x = jax.ShapeDtypeStruct((2, 4), "float32")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    assert_equivalent(nn.Dense(3), model, x, optimizer=optax.adamw(1e-3), seeds=1)


def test_a_custom_derivative_without_forward_mode_is_skipped_and_said() -> None:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return 2 * x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (2 * g,))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return double(nn.Dense(3)(x))

    report = compare(Linen(), Linen(), jax.ShapeDtypeStruct((2, 4), "float32"), seeds=1)
    assert report.agrees
    assert "jvp, which raw JAX refuses too" in report.skipped[0]


def test_a_model_that_fails_is_named_with_the_module_that_failed() -> None:
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    reference = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    report = compare(
        reference, model, jax.ShapeDtypeStruct((2, 4), "float32"), check_values=False, seeds=1
    )
    assert not report.agrees
    assert [r.path for r in report.failures if r.what == "variable"] == ["params/layers_1/kernel"]
    assert [r.path for r in report.failures if r.what == "call"] == ["layers_1"]


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nnx.Embed(3, 4, rngs=nnx.Rngs(0)), X, "no variable.*no params/bias; .*Say which stands"),
        (lambda x: x, X, "got function, which is no Linen module"),
    ],
    ids=["another model", "no module"],
)
def test_what_cannot_be_compared_says_why(model: Any, x: Any, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        compare(nn.Dense(3), model, x)


def test_inputs_that_do_not_fit_are_named_with_the_path_in_linen() -> None:
    variables = m.Mlp().init(jax.random.key(0), jnp.ones((2, 4)), train=False)
    with pytest.raises(CaseError, match=r"Mlp does not run: .*kernel.*/Dense_0"):
        model = m.MlpRewrite(nnx.Rngs(0))
        compare(m.Mlp(), model, jnp.ones((2, 5)), variables=variables, kwargs={"train": False})


def test_arguments_that_the_model_does_not_take_are_said_by_its_row() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
            return nn.Dense(3, name="inner")(x) + y

    class One(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    report = compare(Two(), One(), jnp.ones((2, 4)), jnp.ones(3), seeds=1, steps=1)
    (row,) = report.failures
    assert "takes 2 positional arguments but 3 were given" in row.error


def test_state_that_only_the_model_has_is_its_own_affair() -> None:
    class Counting(nnx.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, rngs=nnx.Rngs(0))
            self.calls = Calls(jnp.zeros((), jnp.int32))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.calls[...] += 1
            return super().__call__(x)

    class Calls(nnx.Variable[Any]):
        pass

    assert_equivalent(nn.Dense(3), Counting(), jax.ShapeDtypeStruct((2, 4), "float32"), seeds=1)


def test_a_stream_that_is_passed_from_module_to_module_stays_itself() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            first = nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x))
            return first + nn.Dropout(0.5, deterministic=False)(first)

    class Native(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.Dense_0 = nnx.Linear(4, 8, rngs=rngs)
            self.drop, self.rngs = nnx.Dropout(0.5), rngs

        def __call__(self, x: jax.Array) -> jax.Array:
            first = self.drop(self.Dense_0(x), rngs=self.rngs)
            return first + self.drop(first, rngs=self.rngs)

    x = jax.ShapeDtypeStruct((4, 4), "float32")
    assert_equivalent(Linen(), Native(nnx.Rngs(0)), x, seeds=1, steps=2)


def test_caches_are_compared_from_step_to_step() -> None:
    reference = nn.MultiHeadDotProductAttention(2, decode=True, deterministic=True)
    variables = reference.init(jax.random.key(0), jnp.ones((2, 4, 6)))
    model = nnx.MultiHeadAttention(2, 6, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((2, 4, 6))
    token = jax.ShapeDtypeStruct((2, 1, 6), "float32")
    report = assert_equivalent(
        reference,
        model,
        token,
        variables=variables,
        check_values=False,
        seeds=1,
        kwargs={"deterministic": True},
    )
    paths = {row.path for row in report.rows if row.what == "state, step 3"}
    assert paths == {f"cache/{name}" for name in ("cache_index", "cached_key", "cached_value")}


class Counting(nn.Module):
    """Its output grows with the number of calls."""

    by: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        y = nn.Dense(2)(x) * (1 + self.by * calls.value)
        if not self.is_initializing():
            calls.value += 1
        return y


def test_what_differs_from_the_second_step_on_is_found() -> None:
    x = jax.ShapeDtypeStruct((2, 3), "float32")
    report = compare(Counting(0.0), Counting(1.0), x, seeds=1, steps=2)
    wrong = {row.what for row in report.rows if not row.verdict.agrees}
    assert wrong == {"output, step 2", "parameter, step 2"}


def test_random_integers_need_a_range() -> None:
    with pytest.raises(ValueError, match=r"int32 and shape \[2\] has no range; .*high="):
        Random((2,), "int32")
    with pytest.raises(ValueError, match=r"no value lies in \[5, 3\)"):
        Random((2,), "int32", low=5, high=3)


def test_random_inputs_stay_in_their_range() -> None:
    random = np.random.default_rng(0)
    assert set(np.unique(Random((99,), "int32", low=2, high=5).draw(random))) == {2, 3, 4}
    image = Random((9, 9), low=0, high=1).draw(random)
    assert image.min() >= 0 and image.max() < 1
    assert Random((4, 9), "bool").draw(random)[:, 0].all()


def test_float64_is_reached_through_explicit_dtypes_scans_and_checkpoints() -> None:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.checkpoint(jnp.sin)(x.astype(BF16)).astype(jnp.float32) * 1.1, None

    def fn(x: jax.Array) -> dict[str, jax.Array]:
        return {"rounded": jax.lax.scan(body, x, None, length=3)[0], "plain": x * 3}

    x = np.linspace(0.1, 1, 5, dtype=np.float32)
    exact, expected = Exact(fn, jnp.asarray(x)), x.astype(np.float64)
    for _ in range(3):
        expected = np.sin(expected) * np.float64(np.float32(1.1))
    np.testing.assert_allclose(exact(x)["rounded"], expected, rtol=1e-14)
    precision = {name: float(jnp.finfo(dtype).eps) for name, dtype in
                 (("rounded", BF16), ("plain", jnp.float32))}  # fmt: skip
    assert exact.precision == precision


def test_float64_is_not_rounded_where_a_program_asks_for_it() -> None:
    x = np.float32(0.1)
    exact = Exact(lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7), x)
    assert np.asarray(exact(x)) == np.float64(x)


def test_what_is_not_a_number_is_named_with_its_layer() -> None:
    class Roots(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sqrt(super().__call__(x))

    x = jax.ShapeDtypeStruct((8, 4), "float32")
    report = compare(nn.Dense(3), Roots(4, 3, rngs=nnx.Rngs(0)), x, seeds=1, steps=1)
    assert report.parting is not None
    assert "are no numbers, and 0 in the reference; the first at (" in report.parting.reason


class Inference(nn.Module):
    """Says the mode in a way that is not Linen's own."""

    @nn.compact
    def __call__(self, x: jax.Array, inference: bool) -> jax.Array:
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=inference)


class InferenceRewrite(nnx.Module):
    """The same in NNX."""

    def __init__(self) -> None:
        self.Dense_0 = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.Dense_0(x))


def test_the_mode_is_known_by_the_names_that_hosts_know() -> None:
    report = assert_equivalent(Inference(), InferenceRewrite(), X, seeds=1, steps=1)
    assert {row.route for row in report.rows} == {"prediction", "training"}


def test_a_field_that_is_given_says_the_mode_although_there_is_an_argument() -> None:
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    reference = nn.BatchNorm(use_running_average=True, momentum=0.99)
    report = assert_equivalent(reference, model, X, seeds=1, steps=1)
    assert {row.route for row in report.rows} == {"prediction", "training"}


class Counted(nn.Module):
    """Gives a number of Python beside an array."""

    count: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, int]]:
        return nn.Dense(3)(x), {"count": self.count}


def test_numbers_of_python_are_compared_too() -> None:
    report = compare(Counted(1), Counted(2), X, seeds=1, steps=1)
    assert ("output", "1/count") in {(row.what, row.path) for row in report.failures}
    assert_equivalent(Counted(1), Counted(1), X, seeds=1, steps=1)
