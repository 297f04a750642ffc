"""What fails in Flax itself (the list in the documentation of this project's problem), each as a
call of ours that works. Where Flax repairs one of these, its own call may be used again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lifted
import nnx_bridge
from tests.helpers import (
    assert_trees_close,
    assert_trees_equal,
    call,
    initialized,
    normal,
    normal_like,
    strict,
    total,
)
from tests.lifted import models as linen_models
from tests.nnx_bridge import models

X = normal(4, 3)


# Calls to lifted transforms.


@pytest.mark.parametrize("mode", [True, False], ids=["graph", "tree"])
@pytest.mark.parametrize("transform", ["jvp", "vjp"])
def test_jvp_and_vjp_of_a_module_with_dropout_at_default_settings(
    transform: str, mode: bool
) -> None:
    with nnx.set_graph_mode(mode):
        mdl = models.make(models.Noisy)
        if transform == "jvp":
            lifted.jvp(call, mdl, (X,), (X,), nnx.state(mdl, nnx.Param))
        else:
            y, bwd = lifted.vjp(call, mdl, X)
            bwd(y)
    assert mdl.drop.rngs.count[...] == 1


WRITERS: dict[str, type[nnx.Module]] = {"BatchNorm": models.Norm, "Dropout": models.Noisy}


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd"])
@pytest.mark.parametrize("writer", [*WRITERS, "sow", "perturb"])
def test_derivatives_of_a_submodule_that_writes(writer: str, transform: str) -> None:
    class Sower(models.MLP):
        def __call__(self, x: jax.Array) -> jax.Array:
            y = super().__call__(x)
            if writer == "sow":
                self.sow(nnx.Intermediate, "y", y)
            return self.perturb("y", y) if writer == "perturb" else y

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = WRITERS.get(writer, Sower)(rngs)

        def __call__(self, x: jax.Array) -> Any:
            if transform == "grad":
                return lifted.grad(total, self.inner, x)
            if transform == "jvp":
                return lifted.jvp(call, self.inner, (x,), (x,), {})
            return lifted.jacfwd(call, self.inner, x[0])

    types = nnx.Intermediate, nnx.Perturbation
    with jax.checking_leaks():
        nnx_bridge.capture(models.make(Outer), *types)(X)


def test_jvp_of_a_linen_module_that_was_given_other_modules() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            holder = linen_models.Holder(nn.Dense(2, name="given"))
            return lifted.jvp(call, holder, (x,), (x,), {})

    variables = initialized(Model(), X)
    y, y_dot = Model().apply(variables, X)
    assert y.shape == y_dot.shape


def _jvp(module: nn.Module, variables: Any, tangents: Any) -> Any:
    return lifted.jvp(call, module.bind(variables), (X,), (X,), tangents)


def test_tangents_for_a_part_of_a_collection() -> None:
    variables = initialized(linen_models.MLP(), X)
    kernel = variables["params"]["Dense_0"]["kernel"]
    _jvp(linen_models.MLP(), variables, {"params": {"Dense_0": {"kernel": kernel}}})
    mdl = models.make(models.MLP)
    kernel = mdl.first.kernel[...]
    lifted.jvp(call, mdl, (X,), (X,), {"params": {"first": {"kernel": kernel}}})


def test_plain_tangents_of_partitioned_parameters() -> None:
    module = linen_models.Boxed()
    variables = initialized(module, X)
    plain = _jvp(module, variables, nn.meta.unbox(variables))
    assert_trees_equal(plain, _jvp(module, variables, variables))


def test_a_misspelt_collection_is_named() -> None:
    variables = initialized(linen_models.MLP(), X)
    message = r"variable_tangents/parms.*did you mean 'params'"
    with pytest.raises(ValueError, match=message):
        _jvp(linen_models.MLP(), variables, {"parms": variables["params"]})
    mdl = models.make(models.MLP)
    tangents = {"parms": {"first": {"kernel": mdl.first.kernel[...]}}}
    with pytest.raises(ValueError, match=r"variable_tangents/parms.*did you mean 'params/first/k"):
        lifted.jvp(call, mdl, (X,), (X,), tangents)


def test_tangents_of_variables_come_back() -> None:
    def transform(mdl: Any, x: jax.Array) -> Any:
        return lifted.jvp(call, mdl, (x,), (x,), {}, return_variable_tangents=True)[2]

    variables = initialized(linen_models.Norm(), X)
    apply = nn.apply(transform, linen_models.Norm(), mutable=["batch_stats"])
    assert set(apply(variables, X)[0]) == {"batch_stats"}
    assert set(transform(models.make(models.Norm), X)) == {"norm"}


def test_grad_of_a_function_that_returns_a_python_float() -> None:
    linen = linen_models.MLP().bind(initialized(linen_models.MLP(), X))
    for mdl in (linen, models.make(models.MLP)):
        (grad,) = lifted.grad(lambda mdl, x: 1.0, mdl, X)
        assert_trees_equal(grad, jnp.zeros_like(X))


def test_reduce_axes() -> None:
    graphdef, state = nnx.split(models.make(models.MLP))
    mdl = nnx.merge(graphdef, state)

    def per_example(x: jax.Array) -> Any:
        return lifted.grad(total, mdl, x, grad_variables="params", reduce_axes=("batch",))

    grads, x_grad = jax.vmap(per_example, axis_name="batch", out_axes=(None, 0))(X)
    expected = lifted.grad(total, mdl, X, grad_variables="params")
    assert_trees_close((grads, x_grad), expected)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_jacobian_of_a_submodule_together_with_its_output(kind: str) -> None:
    """google/flax #735."""
    linen = linen_models.MLP().bind(initialized(linen_models.MLP(), X))
    mdl = linen if kind == "linen" else models.make(models.MLP)
    (jacobian,), y = lifted.jacfwd(lambda m, x: (m(x),) * 2, mdl, X[0], has_aux=True)
    assert_trees_close(y, mdl(X[0]))
    assert_trees_equal(jacobian, jax.jacfwd(mdl)(X[0]))


def test_a_linearised_network_with_statistics_and_dropout_trains() -> None:
    """google/flax #4636."""

    class Base(models.Norm):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(self.drop(x))

    class Linearised(nnx.Module):
        """f(x; t) + J(x; t) d, where only d is trained."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.base = Base(rngs)
            frozen = nnx.state(self.base, nnx.Param)
            zeros = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(frozen))
            self.offset = Offset(zeros)

        def __call__(self, x: jax.Array) -> jax.Array:
            offset = nnx.State(self.offset.get_value())
            y, y_dot = lifted.jvp(call, self.base, (x,), (None,), offset)
            return y + y_dot

    class Offset(nnx.Variable[Any]):
        pass

    mdl = models.make(Linearised)
    optimizer = nnx.Optimizer(mdl, optax.sgd(0.05), wrt=Offset)
    kernel = mdl.base.dense.kernel.get_raw_value()

    @nnx.jit
    def step(mdl: Any, optimizer: Any) -> jax.Array:
        loss = lambda mdl, x: jnp.mean((mdl(x) - 1.0) ** 2)  # noqa: E731
        value, (grads, *_) = lifted.value_and_grad(loss, mdl, X, grad_variables=Offset)
        optimizer.update(mdl, grads)
        return value

    losses = [float(step(mdl, optimizer)) for _ in range(20)]
    assert min(losses[-5:]) < losses[0]
    assert_trees_equal(mdl.base.dense.kernel.get_raw_value(), kernel)
    assert mdl.base.drop.rngs.count[...] == 20


def test_gradient_and_jacobian_over_scanned_layers_with_dropout() -> None:
    """google/flax #4771."""
    for transform in (lifted.jacfwd, lifted.jacrev):
        mdl = models.make(models.Stacked)
        (jacobian,) = transform(lambda m, x: m(x).sum(0), mdl, X)
        assert jacobian.shape == (3, 4, 3)
        assert_trees_equal(mdl.layers.drop.rngs.count[...], jnp.ones(3, jnp.uint32))


# Intermediates and their gradients.


class Sower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.perturb("x", x)
        y = self.dense(x)
        self.sow(nnx.Intermediate, "y", y)
        return y


def test_a_capture_leaves_no_mark_after_an_exception() -> None:
    mdl = models.make(Sower)
    before = dict(vars(mdl))
    with pytest.raises(TypeError):
        nnx_bridge.capture(mdl, nnx.Intermediate)("no array")
    assert vars(mdl) == before


def test_a_nested_capture_does_not_empty_the_outer_one() -> None:
    def outer(mdl: Any, x: jax.Array) -> Any:
        mdl(x)
        return nnx_bridge.capture(mdl, nnx.Intermediate)(2 * x)[1]

    inner, outside = nnx_bridge.capture(outer, nnx.Intermediate)(models.make(Sower), X)
    assert len(outside["y"].get_value()) == len(inner["y"].get_value()) == 1
    assert not jnp.array_equal(outside["y"].get_value()[0], inner["y"].get_value()[0])


def test_intermediates_and_perturbations_in_one_capture_are_kept_apart() -> None:
    capture = nnx_bridge.capture(models.make(Sower), nnx.Intermediate, nnx.Perturbation)
    _, sown, perturbed = capture(X)
    assert (set(sown), set(perturbed)) == ({"y"}, {"x"})


def test_a_capture_with_vmap_inside() -> None:
    def fn(mdl: Any, x: jax.Array) -> Any:
        axes = nnx.StateAxes({nnx.Intermediate: 0, ...: None})
        return nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0))(mdl, x)

    _, sown = nnx_bridge.capture(fn, nnx.Intermediate)(models.make(Sower), X)
    assert sown["y"].get_value()[0].shape == (4, 2)


def test_a_hosted_linen_model_can_be_used_in_and_after_a_capture() -> None:
    module = linen_models.Sower()
    host = nnx_bridge.Host(module, initialized(module, X))
    expected = host(X)
    for capture in (nnx_bridge.capture, nnx.capture):
        assert_trees_equal(capture(host, nnx.Intermediate)(X)[0], expected)
    assert_trees_equal(host(X), expected)


# The model itself.


def test_a_hosted_model_shows_its_submodules_and_updates_statistics_by_itself() -> None:
    module = linen_models.Norm()
    host = nnx_bridge.Host(module, initialized(module, X))
    assert {path for path, _ in nnx.iter_modules(host)} >= {("Dense_0",), ("BatchNorm_0",)}
    before = host.BatchNorm_0.mean.get_value()
    with strict():
        grads, _ = lifted.grad(total, host, X, grad_variables="params")
    assert jnp.any(host.BatchNorm_0.mean.get_value() != before)
    assert_trees_equal(jax.tree.map(jnp.shape, normal_like(grads)), jax.tree.map(jnp.shape, grads))
