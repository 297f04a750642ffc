"""Each parameter of each transform does what it says: a test fails if it is passed over."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lifted
import nnx_bridge as nn
from tests.helpers import assert_trees_close, assert_trees_equal, normal, program
from tests.nnx_bridge import models

X = normal(4, 3)
TRANSFORMS = (
    "vmap scan remat checkpoint remat_scan jit while_loop cond switch custom_vjp map_variables "
    "add_metadata_axis fold_rngs named_call"
).split()


def call(mdl: Any, *args: Any) -> Any:
    return mdl(*args)


def linear() -> nnx.Linear:
    return nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def equation(name: str, fn: Any, *args: Any) -> dict[str, Any]:
    """The parameters of the only equation of a primitive."""
    equations = jax.make_jaxpr(fn)(*args).eqns
    (found,) = [e for e in equations if e.primitive.name == name]
    return dict(found.params)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameters_have_linens_names_order_and_defaults(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(package, name)).parameters for package in (nn, linen))
    assert list(ours) == list(theirs)
    for parameter in ours:
        given, wanted = ours[parameter].default, theirs[parameter].default
        if parameter.startswith("trans_"):  # The identity, by two names.
            assert given(3) == wanted(3)
        else:
            assert given == wanted, parameter


class Streams(nnx.Module):
    """Variables of two collections and two streams, in which nothing but reading happens."""

    def __init__(self) -> None:
        self.rngs = nnx.Rngs(params=0, dropout=1)
        self.w = nnx.Param(jnp.ones(()))
        self.n = nnx.BatchStat(jnp.ones(()))


def _visible(mdl: Any, *args: Any) -> Any:
    seen.append([name for name in ("w", "n") if hasattr(mdl, name)])
    seen.append([s for s in ("params", "dropout") if hasattr(getattr(mdl.rngs, s), "key")])
    return jnp.ones(())


seen: list[Any] = []


@pytest.mark.parametrize(
    "run",
    [
        lambda **filters: nn.remat(_visible, **filters)(Streams()),
        lambda **filters: nn.jit(_visible, **filters)(Streams()),
        lambda **filters: nn.cond(True, _visible, _visible, Streams(), **filters),
        lambda **filters: nn.switch(0, [_visible, _visible], Streams(), **filters),
        lambda **filters: nn.fold_rngs(_visible, **filters)(Streams()),
        lambda **filters: nn.map_variables(_visible, "other", **filters)(Streams()),
    ],
    ids=["remat", "jit", "cond", "switch", "fold_rngs", "map_variables"],
)
def test_filters_of_what_is_visible(run: Any) -> None:
    seen.clear()
    run(variables="params", rngs="dropout")
    run(variables="batch_stats", rngs="params")
    branches = len(seen) // 4
    assert seen == [["w"], ["dropout"]] * branches + [["n"], ["params"]] * branches


def test_streams_that_are_not_forked_are_not_advanced() -> None:
    mdl = Streams()
    nn.fold_rngs(lambda mdl: mdl.rngs.dropout(), rngs="dropout")(mdl)
    assert (int(mdl.rngs.dropout.count[...]), int(mdl.rngs.params.count[...])) == (1, 0)


# vmap


def test_collectives_use_the_name_of_the_axis() -> None:
    run = nn.vmap(lambda mdl, x: jax.lax.pmean(mdl(x), "b"), {"params": None}, axis_name="b")
    mdl = linear()
    assert_trees_close(run(mdl, X)[0], mdl(X).mean(0))


def test_in_and_out_are_directions() -> None:
    def step(mdl: Any, carry: jax.Array) -> Any:
        mdl.log = nnx.Cache(mdl.w[...] * carry)
        return carry + 1, None

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.arange(3.0))
            self.log = nnx.Cache(jnp.zeros(()))  # Not stacked: it does not come in.

    scanned, mapped = Module(), Module()
    axes = {"params": nn.In(0), "cache": nn.Out(0)}
    nn.scan(step, axes)(scanned, jnp.array(1.0))
    assert_trees_equal(scanned.log[...], jnp.array([0.0, 2.0, 6.0]))
    nn.vmap(step, axes, in_axes=None, out_axes=(None, None))(mapped, jnp.array(1.0))
    assert_trees_equal(mapped.log[...], jnp.array([0.0, 1.0, 2.0]))


# scan


@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 0), (1, -1), (-2, 1)])
def test_axes_of_arguments_and_outputs(in_axis: int, out_axis: int) -> None:
    mdl, whole = linear(), jnp.arange(3.0)

    def step(mdl: Any, carry: jax.Array, x: Any, offset: Any) -> Any:
        return carry + x["x"].sum(), {"y": mdl(x["x"] + offset), "none": None, "last": offset}

    run = nn.scan(
        step,
        variable_broadcast="params",
        in_axes=(in_axis, nn.broadcast),
        out_axes={"y": out_axis, "none": 0, "last": nn.broadcast},
    )
    xs = {"x": jnp.moveaxis(X, 0, in_axis), "none": None}
    carry, ys = run(mdl, jnp.array(0.0), xs, whole)
    assert_trees_close(carry, X.sum())
    assert ys["none"] is None
    assert_trees_close(jnp.moveaxis(ys["y"], out_axis, 0), mdl(X + whole))
    assert_trees_equal(ys["last"], whole)


def test_reverse_and_unroll() -> None:
    run = nn.scan(lambda mdl, c, x: (c + x, c), length=4, reverse=True, unroll=2)
    mdl, xs = linear(), jnp.arange(4.0)
    _, ys = run(mdl, jnp.array(0.0), xs)
    assert_trees_equal(ys, jnp.array([6.0, 5.0, 3.0, 0.0]))
    assert equation("scan", lambda xs: run(mdl, 0.0, xs), xs)["unroll"] == 2


def test_the_option_that_splits_the_transpose() -> None:
    """JAX takes it for a keyword of its own; what it changes is not in the program of a loop."""
    run = nn.scan(lambda mdl, c: (mdl(c), None), {}, True, length=2, _split_transpose=True)
    mdl = linear()
    with pytest.MonkeyPatch.context() as patch:
        options: dict[str, Any] = {}
        scan = jax.lax.scan
        patch.setattr(
            jax.lax, "scan", lambda *args, **kwargs: options.update(kwargs) or scan(*args, **kwargs)
        )
        run(mdl, X)
    assert options["_split_transpose"] is True


def test_constancy_that_is_not_checked() -> None:
    def step(mdl: Any, carry: jax.Array) -> Any:
        mdl.n[...] += carry
        return carry, None

    mdl = Streams()
    options = {"variable_broadcast": ("params", "batch_stats"), "length": 2}
    with pytest.raises(ValueError, match="n is the same for all steps"):
        nn.scan(step, **options)(mdl, jnp.array(2.0))
    nn.scan(step, check_constancy_invariants=False, **options)(mdl, jnp.array(2.0))
    assert float(mdl.n[...]) == 3.0


# remat, remat_scan


def test_remat_keeps_common_subexpressions_apart_unless_told() -> None:
    mdl = linear()
    for prevent in (True, False):
        run = nn.remat(call, prevent_cse=prevent)
        found = {
            e.primitive.name: e.params for e in jax.make_jaxpr(functools.partial(run, mdl))(X).eqns
        }
        (params,) = [p for p in found.values() if "prevent_cse" in p]
        assert np.all(params["prevent_cse"]) == prevent


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.n = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.n[...] += 1
        return jnp.tanh(self.dense(x))


def test_remat_scan_takes_the_options_of_scan() -> None:
    options = {"variable_broadcast": "params", "variable_carry": "batch_stats", "variable_axes": {}}
    split = {"split_rngs": {"params": False}}
    mdl = nn.remat_scan(Layer, lengths=(2, 3), **options, **split)(nnx.Rngs(0))
    assert mdl.dense.kernel.shape == (3, 3)
    y = mdl(X)
    assert float(mdl.n[...]) == 6.0
    wanted = X
    for _ in range(6):
        wanted = jnp.tanh(mdl.dense(wanted))
    assert_trees_close(y, wanted)


def test_remat_scan_puts_the_axis_where_it_is_told() -> None:
    Stack = nn.remat_scan(nnx.Linear, lengths=(2,), variable_axes={"params": 1})
    stack = Stack(3, 3, rngs=nnx.Rngs(0))
    assert stack.kernel.shape == (3, 2, 3)
    wanted = X
    for i in range(2):
        wanted = wanted @ stack.kernel[:, i] + stack.bias[:, i]
    assert_trees_close(stack(X), wanted)


def test_remat_scan_has_a_policy() -> None:
    policies = jax.checkpoint_policies

    class Tanh(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(super().__call__(x))

    def computed(policy: Any) -> int:
        """How often the gradient computes the nonlinearity."""
        mdl = nn.remat_scan(Tanh, lengths=(2, 2), policy=policy)(3, 3, rngs=nnx.Rngs(0))
        return program(jax.grad(lambda x: mdl(x).sum()), X).count("= tanh")

    assert computed(policies.everything_saveable) < computed(policies.nothing_saveable)


# jit


def test_jit_gives_options_to_jax() -> None:
    mdl = linear()
    run = nn.jit(call, donate_argnums=1)
    donated = equation("jit", lambda x: run(mdl, x), X)["donated_invars"]
    assert sum(donated) == 1 and donated[-1]
    with pytest.MonkeyPatch.context() as patch:
        given: dict[str, Any] = {}

        def jit(fn: Any, **options: Any) -> Any:
            given.update(options)
            return fn

        patch.setattr(jax, "jit", jit)
        nn.jit(call, device="d", backend="b")
    assert (given["device"], given["backend"]) == ("d", "b")


@pytest.mark.parametrize("transform", [nn.jit, nn.remat, nn.map_variables])
def test_only_the_methods_that_are_named_are_lifted(transform: Any) -> None:
    class Two(models.MLP):
        def other(self, x: jax.Array) -> jax.Array:
            return self(x)

    lifted_class = transform(Two, methods=["other"])
    assert "other" in vars(lifted_class)
    assert "__call__" not in vars(lifted_class)
    mdl = lifted_class(nnx.Rngs(0))
    assert_trees_close(mdl.other(X), mdl(X))


# while_loop, custom_vjp, map_variables


def test_a_loop_sees_what_is_broadcast_or_carried() -> None:
    def body(mdl: Any, x: jax.Array) -> jax.Array:
        return x + mdl.w[...]

    def goes_on(mdl: Any, x: jax.Array) -> jax.Array:
        return x < 3

    assert float(nn.while_loop(goes_on, body, Streams(), 0.0, broadcast_variables="params")) == 3
    with pytest.raises(ValueError, match=r"w is used.*Pass carry_variables='params'"):
        nn.while_loop(goes_on, body, Streams(), 0.0, broadcast_variables="batch_stats")


@pytest.mark.parametrize("grad_vars", ["params", "batch_stats", False])
def test_variables_that_have_a_cotangent(grad_vars: Any) -> None:
    def double(mdl: Any, x: jax.Array) -> jax.Array:
        return mdl.w[...] * mdl.n[...] * x

    def forward(mdl: Any, x: jax.Array) -> Any:
        return double(mdl, x), x

    def backward(x: jax.Array, t_y: jax.Array) -> Any:
        return {"params": {"w": 5 * t_y}, "batch_stats": {"n": 7 * t_y}}, t_y

    run = nn.custom_vjp(double, forward, backward, grad_vars=grad_vars)
    grads, _ = lifted.grad(run, Streams(), 2.0, grad_variables=("params", "batch_stats"))
    wanted = {"params": (5.0, 0.0), "batch_stats": (0.0, 7.0), False: (0.0, 0.0)}[grad_vars]
    assert (float(grads["w"].get_value()), float(grads["n"].get_value())) == wanted
