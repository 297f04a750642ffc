"""Layers inside of transforms are compared like others, step by step, and faults found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nnx_bridge
from nnx_bridge import Host, Report, compare
from nnx_bridge.equivalence._tags import Tagged, hoisted, tagged

X = jax.ShapeDtypeStruct((2, 4), "float32")
Activation = Callable[[jax.Array], jax.Array]


class Block(nn.Module):
    """A layer with layers in it."""

    activation: Activation = nn.tanh

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = nn.Dense(4, name="up")(x)
        self.sow("intermediates", "before", h)
        return x + Inner(self.activation, name="inner")(h), None


class Inner(nn.Module):
    """What has the fault."""

    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(nn.Dense(4, name="dense")(x))


class Model(nn.Module):
    """Blocks that are scanned, mapped, rematerialised, compiled, or called as they are."""

    how: str
    activation: Activation = nn.tanh

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.how == "scan":
            blocks = nn.scan(nn.remat(Block), length=3, **axes)(self.activation, name="blocks")
            return nn.Dense(1, name="head")(blocks(x, None)[0])
        if self.how == "vmap":
            blocks = nn.vmap(Block, in_axes=0, **axes)(self.activation, name="blocks")
            return nn.Dense(1, name="head")(blocks(x)[0])
        make = {"plain": lambda cls: cls, "remat": nn.remat, "jit": nn.jit}[self.how]
        for i in range(3):
            x, _ = make(Block)(self.activation, name=f"blocks_{i}")(x)
        return nn.Dense(1, name="head")(x)


class NativeInner(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, activation: Activation) -> None:
        self.dense, self.activation = nnx.Linear(4, 4, rngs=rngs), activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.dense(x))


class NativeBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, activation: Activation) -> None:
        self.up, self.inner = nnx.Linear(4, 4, rngs=rngs), NativeInner(rngs, activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.inner(self.up(x))


class Native(nnx.Module):
    """The rewrite, with a scan of NNX or with a list of layers."""

    def __init__(self, activation: Activation = jnp.tanh, scanned: bool = True) -> None:
        rngs = nnx.Rngs(0)
        if scanned:
            make = nnx.vmap(lambda rngs: NativeBlock(rngs, activation), in_axes=0, out_axes=0)
            self.blocks = make(rngs.split(3) if hasattr(rngs, "split") else rngs.fork(split=3))
        else:
            self.blocks = nnx.List([NativeBlock(rngs, activation) for _ in range(3)])
        self.head, self.scanned = nnx.Linear(4, 1, rngs=rngs), scanned

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x: jax.Array, block: NativeBlock) -> jax.Array:
                return block(x)

            return self.head(run(x, self.blocks))
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(x)


def check(reference: Any, model: Any, **options: Any) -> Report:
    x = jax.ShapeDtypeStruct((3, 2, 4), "float32") if options.pop("mapped", False) else X
    return compare(reference, model, x, seeds=1, steps=1, **options)


def paths(report: Report, what: str) -> set[str]:
    return {row.path for row in report.rows if row.what == what}


@pytest.mark.parametrize(
    ("how", "place", "reason"),
    [
        ("scan", "blocks/inner", "does not, first in step 1; it is after blocks/inner/dense (step"),
        ("vmap", "blocks/inner", "does not; it is after blocks/inner/dense"),
        ("remat", "blocks_0/inner", "does not; it is after blocks_0/inner/dense"),
        ("jit", "blocks_0/inner", "does not; it is after blocks_0/inner/dense"),
    ],
)
def test_a_fault_inside_of_a_transform_is_named_with_the_inner_module(
    how: str, place: str, reason: str
) -> None:
    report = check(Model(how), Model(how, nn.sigmoid), mapped=how == "vmap")
    assert report.parting is not None
    assert report.parting.path == place
    assert reason in report.parting.reason


def test_each_step_of_a_scan_has_its_rows_forward_and_backward() -> None:
    variables = Model("scan").init(jax.random.key(0), jnp.ones((2, 4)))
    report = check(Model("scan"), Host(Model("scan"), variables))
    report.assert_equal()
    steps = {f"blocks/inner/dense (step {i})" for i in (1, 2, 3)}
    assert steps <= paths(report, "layer output")
    assert steps <= paths(report, "layer output gradient")


def test_a_fault_that_begins_at_a_later_step_is_named_with_the_step() -> None:
    class Other:
        def to_model(self, variables: Any) -> Any:
            return jax.tree.map_with_path(self.changed, variables)

        def changed(self, path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x.at[1].multiply(2) if name.endswith("inner/dense/kernel") else x

        def to_reference(self, variables: Any) -> Any:
            return {}

        def module(self, path: str) -> str:
            return path

    report = check(Model("scan"), Model("scan"), correspondence=Other())
    assert report.parting is not None
    assert report.parting.path == "blocks/inner/dense"
    assert "first in step 2" in report.parting.reason


@pytest.mark.parametrize("activation", [jnp.tanh, nnx.sigmoid], ids=["right", "wrong"])
def test_layers_in_a_scan_of_nnx_are_seen(activation: Activation) -> None:
    report = check(Model("scan"), Native(activation))
    assert "blocks/up (step 3)" in paths(report, "layer output")
    assert report.agrees is (activation is jnp.tanh)
    if report.parting is not None:
        assert report.parting.path == "blocks/inner"


def test_a_list_of_layers_is_held_against_the_steps_of_a_scan() -> None:
    variables = Model("scan").init(jax.random.key(0), jnp.ones((2, 4)))
    model = Native(nnx.sigmoid, scanned=False)
    plan = nnx_bridge.load(model, variables)
    report = check(Model("scan"), model, variables=variables, correspondence=plan)
    assert report.parting is not None
    assert report.parting.path == "blocks/inner"
    assert "first in step 1" in report.parting.reason


def test_a_layer_whose_gradient_is_wrong_in_a_scan_is_named() -> None:
    def stopped(x: jax.Array) -> jax.Array:
        y = nn.tanh(x)
        return y / 2 + jax.lax.stop_gradient(y / 2)

    report = check(Model("scan"), Model("scan", stopped))
    assert report.parting is not None
    assert report.parting.path.startswith("blocks")
    assert "the gradient of its output agrees" in report.parting.reason


def test_of_a_long_loop_the_first_steps_are_told_apart() -> None:
    model = nn.RNN(nn.SimpleCell(2))
    x = jax.ShapeDtypeStruct((1, 40, 3), "float32")
    report = nnx_bridge.compare(model, model, x, seeds=1, steps=1)
    report.assert_equal()
    steps = [row for row in report.rows if row.what == "layer output" and "/h " in row.path]
    assert len(steps) == 17
    assert (steps[-1].path, steps[-1].shape[0]) == ("cell/h (steps from 17 on)", 24)


class Sowing(nn.Module):
    factor: float = 1.0
    name_of_sown: str = "weights"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(3)(x)
        self.sow("intermediates", self.name_of_sown, y * self.factor)
        return y


def test_sown_values_are_compared_by_path_and_name() -> None:
    assert "weights" in paths(check(Sowing(), Sowing()), "sown value")
    report = check(Sowing(), Sowing(2.0))
    assert [(row.what, row.path) for row in report.failures] == [("sown value", "weights")]
    assert report.parting is not None and report.parting.kind == "sown value"


def test_sown_values_are_compared_with_those_of_nnx() -> None:
    class Rewrite(nnx.Module):
        def __init__(self) -> None:
            self.Dense_0 = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.Dense_0(x)
            self.sow(nnx.Intermediate, "weights", y)
            return y

    report = check(Sowing(), Rewrite())
    report.assert_equal()
    assert "weights" in paths(report, "sown value")


def test_what_the_model_does_not_sow_is_said() -> None:
    report = check(Sowing(), Sowing(name_of_sown="other"))
    assert report.agrees
    assert report.skipped == ("sown values that the model does not sow: weights",)


def test_a_renaming_that_fits_nothing_is_an_error_with_the_nearest_path() -> None:
    names = {"Dens_0": "first"}
    with pytest.raises(nnx_bridge.CaseError, match="begins with 'Dens_0'; did you mean 'Dense_0'"):
        check(Sowing(), Sowing(), correspondence=names)


def test_a_renaming_may_be_of_modules_without_variables() -> None:
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dropout(0.5, deterministic=True)(nn.Dense(4)(x))

    report = check(Dropping(), Dropping(), correspondence={"Dropout_0": "Dropout_0"})
    assert report.agrees


def test_tags_survive_derivatives_batches_and_loops() -> None:
    def step(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jax.checkpoint(lambda c: jnp.sin(tagged(c * x, "inside")))(carry), None

    def loss(data: Any) -> jax.Array:
        return jax.vmap(lambda c: jax.lax.scan(step, c, data["xs"])[0], in_axes=1)(data["c"]).sum()

    data = {"xs": jnp.arange(1.0, 4.0), "c": jnp.ones((2, 5))}
    _, (forward,) = hoisted(loss, data)
    assert (forward.value.shape, forward.stack) == ((3, 5, 2), (3,))
    gradient, found = hoisted(jax.grad(loss), data)
    (backward,) = (each for each in found if each.backward)
    assert isinstance(backward, Tagged)
    # The gradient of the first step's product, with which the carry is multiplied.
    np.testing.assert_allclose(gradient["c"].T, backward.value[0] * data["xs"][0], rtol=1e-6)
