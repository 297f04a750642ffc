"""`reduce_axes`: gradients of what `fn` broadcasts over a named axis are summed over it, others
stay per example."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import lifted
from tests.helpers import assert_trees_close, assert_trees_equal, call, initialized, normal, total
from tests.lifted import models

MODULE = models.MLP()
BATCH = normal(8, 4)
VARIABLES = initialized(MODULE, BATCH[0])


def _grads(x: jax.Array, axes: Any, variables: Any = VARIABLES) -> Any:
    return lifted.grad(total, MODULE.bind(variables), x, reduce_axes=axes, grad_variables="params")


def _per_example(x: jax.Array) -> Any:
    return jax.vmap(lambda x: _grads(x, ()))(x)


def test_what_is_broadcast_is_summed_and_what_is_mapped_is_not() -> None:
    params, x = jax.vmap(lambda x: _grads(x, ("batch",)), axis_name="batch")(BATCH)
    each_params, each_x = _per_example(BATCH)
    expected = jax.tree.map(lambda g: jnp.broadcast_to(g.sum(0), g.shape), each_params)
    assert_trees_close((params, x), (expected, each_x))


def test_the_sum_is_that_of_an_explicit_psum() -> None:
    def explicit(x: jax.Array) -> Any:
        params, x_grad = _grads(x, ())
        return jax.lax.psum(params, "batch"), x_grad

    actual = jax.vmap(lambda x: _grads(x, ("batch",)), axis_name="batch")(BATCH)
    assert_trees_close(actual, jax.vmap(explicit, axis_name="batch")(BATCH))


def test_the_sum_may_leave_unmapped() -> None:
    summed = jax.vmap(lambda x: _grads(x, ("batch",))[0], axis_name="batch", out_axes=None)(BATCH)
    expected = jax.tree.map(lambda g: g.sum(0), _per_example(BATCH)[0])
    assert_trees_close(summed, expected)


def test_mapped_parameters_are_not_summed() -> None:
    many = jax.tree.map(lambda p: jnp.stack([p] * 8), VARIABLES)
    grads = lambda v, x: _grads(x, ("batch",), v)  # noqa: E731
    actual = jax.vmap(grads, axis_name="batch")(many, BATCH)
    assert_trees_close(actual, _per_example(BATCH))


def test_jit_inside_vmap() -> None:
    grads = lambda x: _grads(x, ("batch",))  # noqa: E731
    actual = jax.vmap(jax.jit(grads), axis_name="batch")(BATCH)
    assert_trees_close(actual, jax.vmap(grads, axis_name="batch")(BATCH))


def test_jit_outside_vmap() -> None:
    mapped = jax.vmap(lambda x: _grads(x, ("batch",)), axis_name="batch")
    assert_trees_close(jax.jit(mapped)(BATCH), mapped(BATCH))


@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b"), ("b", "a"), ()], ids=str)
def test_nested_axes(axes: tuple[str, ...]) -> None:
    x = BATCH.reshape(2, 4, 4)
    mapped = lambda f: jax.vmap(jax.vmap(f, axis_name="b"), axis_name="a")  # noqa: E731
    params, _ = mapped(lambda x: _grads(x, axes))(x)
    each, _ = mapped(lambda x: _grads(x, ()))(x)
    places = tuple({"a": 0, "b": 1}[axis] for axis in axes)
    expected = jax.tree.map(
        lambda g: jnp.broadcast_to(g.sum(places, keepdims=True) if places else g, g.shape), each
    )
    assert_trees_close(params, expected)


def test_the_pullback_of_vjp_sums() -> None:
    def pull(x: jax.Array) -> Any:
        y, bwd = lifted.vjp(call, MODULE.bind(VARIABLES), x, reduce_axes=("batch",))
        return bwd(jnp.cos(y))

    assert_trees_close(
        jax.vmap(pull, axis_name="batch")(BATCH),
        jax.vmap(lambda x: _grads(x, ("batch",)), axis_name="batch")(BATCH),
    )


def test_the_sum_can_be_differentiated() -> None:
    def norm(x: jax.Array, axes: Any, psum: Any) -> jax.Array:
        grads = psum(_grads(x, axes)[0])
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    ours = lambda x: norm(x, ("batch",), lambda g: g)  # noqa: E731
    explicit = lambda x: norm(x, (), lambda g: jax.lax.psum(g, "batch"))  # noqa: E731
    mean = lambda f: lambda x: jax.vmap(f, axis_name="batch")(x).mean()  # noqa: E731
    assert_trees_close(jax.grad(mean(ours))(BATCH), jax.grad(mean(explicit))(BATCH), factor=8)


def test_the_sum_has_a_jvp() -> None:
    ours = jax.vmap(lambda x: _grads(x, ("batch",))[0], axis_name="batch")
    explicit = jax.vmap(lambda x: jax.lax.psum(_grads(x, ())[0], "batch"), axis_name="batch")
    t = normal(8, 4, seed=5)
    assert_trees_close(
        jax.jvp(ours, (BATCH,), (t,))[1], jax.jvp(explicit, (BATCH,), (t,))[1], factor=8
    )


def test_an_axis_of_a_linen_vmap() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return lifted.grad(
                total, models.MLP(), x, reduce_axes=("batch",), grad_variables="params"
            )

    mapped = nn.vmap(
        Model, variable_axes={"params": None}, split_rngs={"params": False}, axis_name="batch"
    )()
    variables = mapped.init(jax.random.key(0), BATCH)
    params, _ = mapped.apply(variables, BATCH)
    inner = {"params": variables["params"]["MLP_0"]}
    each = jax.vmap(lambda x: _grads(x, (), inner)[0])(BATCH)
    expected = jax.tree.map(lambda g: jnp.broadcast_to(g.sum(0), g.shape), each)
    assert_trees_close(params, expected)


def test_without_reduce_axes_the_program_is_the_raw_one() -> None:
    (grad,) = jax.vmap(lambda x: lifted.grad(total, MODULE.bind(VARIABLES), x))(BATCH)
    expected = jax.vmap(jax.grad(lambda x: total(MODULE.bind(VARIABLES), x)))(BATCH)
    assert_trees_equal(grad, expected)


def _mesh(*names: str) -> Mesh:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    shape = (8,) if len(names) == 1 else (2, 4)
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def test_shard_map_sums_what_does_not_vary() -> None:
    @partial(jax.shard_map, mesh=_mesh("batch"), in_specs=P("batch"), out_specs=(P(), P("batch")))
    def sharded(x: jax.Array) -> Any:
        params, x_grad = _grads(x, ("batch",))
        return params, x_grad

    params, x_grad = sharded(BATCH)
    expected_params, expected_x = _grads(BATCH, ())
    assert_trees_close((params, x_grad), (expected_params, expected_x))


def test_vmap_in_shard_map() -> None:
    @partial(jax.shard_map, mesh=_mesh("device"), in_specs=P("device"), out_specs=P())
    def sharded(x: jax.Array) -> Any:
        grads = lambda x: _grads(x, ("device", "batch"))[0]  # noqa: E731
        return jax.vmap(grads, axis_name="batch", out_axes=None)(x)

    expected, _ = _grads(BATCH, ())
    assert_trees_close(sharded(BATCH), expected)


def test_two_mesh_axes() -> None:
    spec = P(("a", "b"))

    @partial(jax.shard_map, mesh=_mesh("a", "b"), in_specs=spec, out_specs=(P(), spec))
    def sharded(x: jax.Array) -> Any:
        return _grads(x, ("a", "b"))

    assert_trees_close(sharded(BATCH), _grads(BATCH, ()))
