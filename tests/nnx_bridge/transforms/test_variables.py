"""Transforms that change how Variables are seen: mapped values, names of axes, cotangents, keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import lifted
import nnx_bridge as nn
from tests.helpers import assert_trees_close, assert_trees_equal, normal, program, strict
from tests.nnx_bridge import models
from tests.nnx_bridge.transforms.twins import LinenBlock, NNXBlock, carried_over, collections

X = normal(4, 3)


def call(mdl: Any, *args: Any) -> Any:
    return mdl(*args)


# map_variables


def _doubled(variables: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, variables)


def _halved(variables: Any) -> Any:
    return jax.tree.map(lambda x: x / 2, variables)


@pytest.mark.parametrize("init", [True, False])
def test_mapped_parameters(init: bool) -> None:
    module = linen.map_variables(linen.Dense, "params", _doubled, _halved, init=True)(3)
    variables = module.init(jax.random.key(0), X)
    lifted_class = nn.map_variables(nnx.Linear, "params", _doubled, _halved, init=init)
    mdl = lifted_class(3, 3, rngs=nnx.Rngs(0))
    plain = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    # Without `init` what the class makes is kept as it is.
    assert_trees_close(mdl.kernel[...], plain.kernel[...] / (2 if init else 1))
    mdl = carried_over(mdl, variables)
    assert_trees_close(mdl(X), module.apply(variables, X))
    grads = nnx.grad(lambda mdl: mdl(X).sum())(mdl)
    wanted = jax.grad(lambda v: module.apply(v, X).sum())(variables)
    assert_trees_close(nn.to_variables(grads), wanted)


def test_mapped_statistics_that_are_written() -> None:
    options = {"trans_in_fn": _doubled, "trans_out_fn": _halved, "mutable": True}
    module = linen.map_variables(LinenBlock, "batch_stats", **options)()
    mdl = nn.map_variables(NNXBlock, "batch_stats", **options)(nnx.Rngs(0))
    variables = module.init(jax.random.key(0), X)
    carried_over(mdl, {name: variables[name] for name in ("params", "batch_stats")})
    for _ in range(2):
        wanted, updates = module.apply(variables, X, mutable=["batch_stats"])
        assert_trees_close(mdl(X), wanted)
        variables = {**variables, **updates}
    assert_trees_close(collections(mdl)["batch_stats"], variables["batch_stats"])


def test_a_variable_that_is_created_from_a_mapped_one() -> None:
    def create(mdl: Any) -> None:
        mdl.copy = nnx.Cache(mdl.kernel[...])

    mdl = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    nn.map_variables(create, "params", _doubled)(mdl)
    assert_trees_close(mdl.copy[...], 2 * mdl.kernel[...])


def test_a_map_inside_of_scanned_layers() -> None:
    def lift(package: Any, target: Any) -> Any:
        mapped = package.map_variables(target, "params", _doubled)
        axes = {"params": 0, "batch_stats": 0}
        return package.scan(mapped, axes, split_rngs={"params": True}, length=2)

    module, mdl = lift(linen, LinenBlock)(), lift(nn, NNXBlock)(nnx.Rngs(0))
    wanted, _ = module.apply(collections(mdl), X, mutable=["batch_stats"])
    assert_trees_close(mdl(X), wanted)


# Names of axes


class LinenNamed(linen.Module):
    seen: Any

    @linen.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
        kernel = self.param("kernel", init, (3, 3), unbox=False)
        self.seen.append(kernel.names)
        return jnp.tanh(x @ kernel.value), None


class NNXNamed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, seen: Any) -> None:
        self.seen = nnx.static(seen)
        with nnx.use_eager_sharding(False):
            self.kernel = nnx.Param(rngs.params.normal((3, 3)), out_sharding=("in", "out"))

    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        self.seen.append(self.kernel.out_sharding)
        return jnp.tanh(x @ self.kernel[...]), None


NAMED = {"metadata_params": {nn.PARTITION_NAME: "layers"}, "split_rngs": {"params": True}}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_the_axis_has_a_name_outside_and_none_inside(transform: str, axis: int) -> None:
    size = {"length": 4} if transform == "scan" else {"axis_size": 4, "in_axes": None}
    options = {"variable_axes": {"params": axis}, **NAMED, **size}
    seen = _Seen()
    module = getattr(linen, transform)(LinenNamed, **options)(seen)
    variables = module.init(jax.random.key(0), X)
    mdl = getattr(nn, transform)(NNXNamed, **options)(nnx.Rngs(0), _Seen())
    assert mdl.kernel.out_sharding == variables["params"]["kernel"].names
    state = nn.to_state(variables)
    assert state["kernel"].out_sharding == mdl.kernel.out_sharding
    nnx.update(mdl, state)
    assert_trees_close(mdl(X)[0], module.apply(variables, X)[0])
    assert set(mdl.seen.values) == set(seen.values) == {("in", "out")}
    assert_trees_equal(nn.to_variables(nnx.state(mdl)), variables)


class _Seen:
    """A list that is equal to every other one, as static attributes have to be."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def append(self, value: Any) -> None:
        self.values.append(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen)

    def __hash__(self) -> int:
        return 0


def test_a_named_variable_that_is_written_keeps_its_names() -> None:
    def write(mdl: Any, x: jax.Array) -> Any:
        mdl.kernel[...] += 1
        return x

    mdl = nn.vmap(NNXNamed, {"params": 1}, axis_size=2, **NAMED)(nnx.Rngs(0), _Seen())
    before = mdl.kernel[...]
    names = mdl.kernel.out_sharding
    nn.vmap(write, {"params": 1}, in_axes=None, **NAMED)(mdl, X)
    assert mdl.kernel.out_sharding == names == ("in", "layers", "out")
    assert_trees_close(mdl.kernel[...], before + 1)


def test_names_need_a_name_for_the_axis() -> None:
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
    with pytest.raises(ValueError, match=r"kernel names its axes.*metadata_params=\{"):
        nn.scan(NNXNamed, **options)(nnx.Rngs(0), _Seen())


def test_an_axis_of_another_name() -> None:
    mdl = nn.scan(NNXNamed, {"params": 0}, length=2, **NAMED)(nnx.Rngs(0), _Seen())
    run = nn.scan(call, {"params": 0}, metadata_params={nn.PARTITION_NAME: "other"})
    with pytest.raises(ValueError, match=r"kernel: axis 0 is called 'layers'.*says 'other'"):
        run(mdl, X)


def test_add_metadata_axis() -> None:
    options = {
        "variable_axes": {"params": 0},
        "metadata_params": {nn.PARTITION_NAME: "layers"},
    }
    mdl = nn.add_metadata_axis(NNXNamed, **options)(nnx.Rngs(0), _Seen())
    mdl(X)
    assert mdl.kernel.out_sharding == ("layers", "in", "out")
    assert mdl.seen.values == [("in", "out")]


# custom_vjp


def _signed(package: Any, vjp: Any) -> Any:
    def forward(mdl: Any, x: jax.Array) -> Any:
        return vjp(call, mdl, x)

    def backward(bwd: Any, t_y: Any) -> Any:
        t_variables, *t_args = bwd(t_y)
        return (jax.tree.map(jnp.sign, t_variables), *t_args)

    return package.custom_vjp(call, forward_fn=forward, backward_fn=backward)


def test_a_backward_pass_of_the_users() -> None:
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return _signed(linen, linen.vjp)(linen.Dense(2, name="dense"), x)

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return _signed(nn, lifted.vjp)(self.dense, x)

    module = Linen()
    variables = module.init(jax.random.key(0), X)
    mdl = carried_over(NNX(nnx.Rngs(0)), variables)
    wanted = jax.grad(lambda v, x: jnp.sin(module.apply(v, x)).sum(), argnums=(0, 1))(variables, X)
    with strict():
        t_mdl, t_x = nnx.grad(lambda mdl, x: jnp.sin(mdl(x)).sum(), argnums=(0, 1))(mdl, X)
    assert_trees_close((nn.to_variables(t_mdl), t_x), wanted)


@pytest.mark.parametrize("given", ["linen", "partial", "none"])
def test_cotangents_in_every_form(given: str) -> None:
    mdl = models.make(models.MLP)

    def backward(residuals: Any, t_y: Any) -> Any:
        bias = jnp.full_like(mdl.first.bias[...], 7.0)
        forms = {
            "linen": {"params": {"first": {"bias": bias}}},
            "partial": {"first": {"bias": bias}},
            "none": None,
        }
        return forms[given], None

    run = nn.custom_vjp(call, lambda mdl, x: (mdl(x), ()), backward)
    grads = nnx.grad(lambda mdl: run(mdl, X).sum())(mdl)
    assert_trees_close(grads.first.bias.get_value(), jnp.full(3, 0.0 if given == "none" else 7.0))
    assert_trees_close(grads.second.kernel.get_value(), jnp.zeros((3, 2)))


def test_what_a_forward_pass_writes_is_written() -> None:
    mdl, plain = models.make(models.Norm), models.make(models.Norm)
    run = _signed(nn, lifted.vjp)
    nnx.grad(lambda mdl: run(mdl, X).sum())(mdl)
    plain(X)
    assert_trees_close(nnx.state(mdl), nnx.state(plain))
    run(mdl, X)
    plain(X)
    assert_trees_close(nnx.state(mdl), nnx.state(plain))


def test_arguments_without_a_cotangent() -> None:
    def scaled(mdl: Any, power: int, x: jax.Array) -> jax.Array:
        return mdl(x) ** power

    def backward(power: int, residuals: Any, t_y: Any) -> Any:
        return None, power * residuals

    run = nn.custom_vjp(scaled, lambda mdl, p, x: (mdl(x) ** p, x), backward, nondiff_argnums=1)
    mdl = models.make(models.MLP)
    assert_trees_close(jax.grad(lambda x: run(mdl, 3, x).sum())(X), 3 * X)
    with pytest.raises(ValueError, match="0 is the module"):
        nn.custom_vjp(scaled, scaled, backward, nondiff_argnums=(0,))


def test_a_cotangent_of_no_variable() -> None:
    run = nn.custom_vjp(call, lambda m, x: (m(x), x), lambda x, t: ({"frist": 1.0}, x))
    with pytest.raises(ValueError, match="frist"):
        jax.grad(lambda x: run(models.make(models.MLP), x).sum())(X)


def test_a_cotangent_of_another_shape() -> None:
    wrong = {"first": {"kernel": jnp.ones(2)}}
    run = nn.custom_vjp(call, lambda m, x: (m(x), x), lambda x, t: (wrong, x))
    with pytest.raises(ValueError, match=r"first/kernel that is float32\[2\], but the Variable is"):
        jax.grad(lambda x: run(models.make(models.MLP), x).sum())(X)


# Keys, names in profiles, data_transform


def test_what_is_drawn_after_folded_streams_does_not_depend_on_them() -> None:
    drawn = []
    for times in (1, 3):
        rngs = nnx.Rngs(0)
        nn.fold_rngs(lambda rngs, times=times: [rngs.normal() for _ in range(times)])(rngs)
        drawn.append(rngs.normal())
    assert_trees_equal(*drawn)


def test_folded_streams_are_forks() -> None:
    rngs = nnx.Rngs(0)
    rngs.normal()
    folded = nnx.clone(rngs)
    for _ in range(2):  # The streams move on, as those that are forked.
        (number,) = nn.fold_rngs(lambda rngs: [rngs.normal()])(folded)
        assert_trees_equal(number, rngs.fork().normal())


def test_a_class_with_folded_streams() -> None:
    mdl = nn.fold_rngs(models.Noisy)(nnx.Rngs(0))
    mdl(X)
    assert int(mdl.drop.rngs.count[...]) == 1


def test_a_named_method() -> None:
    class Named(models.MLP):
        @nn.named_call
        def encode(self, x: jax.Array) -> jax.Array:
            return self(x)

    mdl = Named(nnx.Rngs(0))
    text = jax.jit(mdl.encode).lower(X).as_text(debug_info=True)
    assert "Named.encode" in text
    assert program(mdl.encode, X) == program(mdl, X)


def test_a_data_transform_sees_linens_groups() -> None:
    groups = []

    def transform(variable_groups: Any, rng_groups: Any) -> Any:
        groups.append(jax.tree.map(jnp.shape, (variable_groups, rng_groups)))
        return jax.tree.map(lambda x: 2 * x, variable_groups), rng_groups

    def lift(package: Any, target: Any) -> Any:
        options = {"variable_carry": "batch_stats", "split_rngs": {"params": True}, "length": 2}
        return package.scan(target, {"params": 0}, data_transform=transform, **options)

    module, mdl = lift(linen, LinenBlock)(), lift(nn, NNXBlock)(nnx.Rngs(0))
    groups.clear()  # The class was made without it.
    wanted, _ = module.apply(collections(mdl), X, mutable=["batch_stats"])
    of_linen = groups[0][0]
    groups.clear()
    assert_trees_close(mdl(X), wanted)
    assert groups[0][0] == of_linen
