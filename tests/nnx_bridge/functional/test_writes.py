"""What `fn` does to an NNX module reaches the caller once, as if `fn` had been called plainly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lifted
from tests.helpers import assert_trees_close, assert_trees_equal, call, normal, strict, total
from tests.lifted.transforms import TRANSFORMS
from tests.nnx_bridge import models

X = normal(4, 3)


def assert_modules_equal(actual: Any, expected: Any) -> None:
    """The same graph and the same values, as far as two programs may agree."""
    graphdef, state = nnx.split(actual)
    wanted, wanted_state = nnx.split(expected)
    assert graphdef == wanted
    assert_trees_close(state, wanted_state)


WRITERS = ["norm", "noisy", "counter", "containers", "stacked"]


@pytest.mark.parametrize("model", WRITERS)
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "linearize"])
def test_the_writes_are_those_of_a_plain_call(model: str, transform: str) -> None:
    mdl, plain = (models.make(models.MODELS[model]) for _ in range(2))
    TRANSFORMS[transform](mdl, X)
    plain(X)
    assert_modules_equal(mdl, plain)


def test_every_variable_stays_the_object_that_it_was() -> None:
    mdl = models.make(models.Containers)
    before = [id(v) for _, v in nnx.iter_graph(mdl)]
    lifted.grad(total, mdl, X, grad_variables=True)
    assert [id(v) for _, v in nnx.iter_graph(mdl)] == before


@pytest.mark.parametrize("edited", [False, True])
def test_what_is_not_written_stays_the_array_that_it_was(edited: bool) -> None:
    mdl = models.make(models.MLP)
    kernel = mdl.first.kernel.get_raw_value()
    fn = editing(_create) if edited else total
    lifted.grad(fn, mdl, X, grad_variables=False)
    assert mdl.first.kernel.get_raw_value() is kernel


def test_writes_of_nested_transforms_happen_once() -> None:
    mdl = models.make(models.Counter)
    gradient = lambda mdl, x: lifted.grad(total, mdl, x)[0]  # noqa: E731
    with strict():
        lifted.jvp(gradient, mdl, (X,), (X,), {})
    assert mdl.count[...] == 1


def test_two_calls_write_twice() -> None:
    mdl = models.make(models.Noisy)
    for _ in range(2):
        lifted.grad(total, mdl, X)
    assert mdl.drop.rngs.count[...] == 2


# Changes of the graph.


def _create(mdl: Any, x: jax.Array) -> None:
    mdl.extra = nnx.Param(x.sum(0))


def _replace(mdl: Any, x: jax.Array) -> None:
    mdl.first.bias = nnx.BatchStat(x.mean(0))


def _delete(mdl: Any, x: jax.Array) -> None:
    del mdl.first.bias


def _new_submodule(mdl: Any, x: jax.Array) -> None:
    mdl.extra = nnx.BatchNorm(3, rngs=nnx.Rngs(1))
    mdl.extra(x)


def _replace_submodule(mdl: Any, x: jax.Array) -> None:
    mdl.first = nnx.Linear(3, 3, rngs=nnx.Rngs(1))


def _delete_submodule(mdl: Any, x: jax.Array) -> None:
    del mdl.second


def _static(mdl: Any, x: jax.Array) -> None:
    mdl.calls = getattr(mdl, "calls", 0) + 1


def _array(mdl: Any, x: jax.Array) -> None:
    mdl.buffer = nnx.data(x * 2)


def _alias(mdl: Any, x: jax.Array) -> None:
    mdl.alias = mdl.first


def _tie(mdl: Any, x: jax.Array) -> None:
    mdl.first.tied = mdl.second.kernel


def _swap(mdl: Any, x: jax.Array) -> None:
    mdl.first, mdl.second = mdl.second, mdl.first


def _cycle(mdl: Any, x: jax.Array) -> None:
    mdl.first.parent = mdl


def _containers(mdl: Any, x: jax.Array) -> None:
    mdl.items = nnx.List([mdl.first, nnx.Param(x.sum(0))])
    mdl.items.append(mdl.second)
    mdl.named = nnx.Dict(a=nnx.Variable(x))


def _metadata(mdl: Any, x: jax.Array) -> None:
    mdl.first.kernel.set_metadata("unit", "m")


def _write_and_create(mdl: Any, x: jax.Array) -> None:
    mdl.second.bias[...] = x.sum(0)[:2]
    mdl.extra = nnx.Param(mdl.first.kernel[...] * 2)


def _eval(mdl: Any, x: jax.Array) -> None:
    mdl.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    mdl.eval()


EDITS: dict[str, Callable[[Any, jax.Array], None]] = {
    edit.__name__[1:]: edit
    for edit in (
        _create,
        _replace,
        _delete,
        _new_submodule,
        _replace_submodule,
        _delete_submodule,
        _static,
        _array,
        _alias,
        _tie,
        _swap,
        _cycle,
        _containers,
        _metadata,
        _write_and_create,
        _eval,
    )
}


def editing(edit: Callable[..., None]) -> Callable[..., Any]:
    def fn(mdl: Any, x: jax.Array) -> jax.Array:
        y = total(mdl, x)
        edit(mdl, x)
        return y

    return fn


@pytest.mark.parametrize("name", EDITS)
def test_the_graph_is_that_after_a_plain_call(name: str) -> None:
    mdl, plain = (models.make(models.MLP) for _ in range(2))
    with strict():
        lifted.grad(editing(EDITS[name]), mdl, X, grad_variables=nnx.Param)
    EDITS[name](plain, X)
    assert_modules_equal(mdl, plain)


@pytest.mark.parametrize("name", EDITS)
def test_the_graph_under_jit_and_a_nested_transform(name: str) -> None:
    mdl, plain = (models.make(models.MLP) for _ in range(2))
    inner = lambda mdl, x: lifted.grad(editing(EDITS[name]), mdl, x)[0]  # noqa: E731

    @nnx.jit
    def outer(mdl: Any, x: jax.Array) -> Any:
        return lifted.jvp(inner, mdl, (x,), (x,), {})

    outer(mdl, X)
    nnx.jit(EDITS[name])(plain, X)
    assert_modules_equal(mdl, plain)


@pytest.mark.parametrize("name", ["alias", "tie", "swap", "cycle", "containers"])
def test_objects_that_are_moved_are_still_the_same_objects(name: str) -> None:
    mdl = models.make(models.MLP)
    held = {id(mdl.first), id(mdl.second), id(mdl.first.kernel), id(mdl.second.kernel)}
    lifted.grad(editing(EDITS[name]), mdl, X)
    assert held <= {id(node) for _, node in nnx.iter_graph(mdl)}


def test_a_created_variable_holds_a_primal_value() -> None:
    mdl = models.make(models.MLP)
    with strict():
        lifted.hessian(editing(_create), mdl, X)
    assert_trees_equal(mdl.extra[...], X.sum(0))


def test_containers_of_python_that_are_changed_in_place() -> None:
    class Plain(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.data({"a": nnx.Param(jnp.ones(3))})
            self.items = nnx.data([nnx.Param(jnp.ones(3))])
            self.pair = nnx.data(([nnx.Param(jnp.ones(3))],))

    for change in range(3):
        mdl, plain = Plain(), Plain()
        only = [change == i for i in range(3)]

        def one(mdl: Any, x: jax.Array, only: Any = only) -> jax.Array:
            mdl.table.update({"b": nnx.Param(x)} if only[0] else {})
            mdl.items.extend([nnx.Param(x)] if only[1] else [])
            mdl.pair[0].extend([nnx.Param(x)] if only[2] else [])
            return jnp.sum(x)

        lifted.grad(one, mdl, X)
        one(plain, X)
        assert_modules_equal(mdl, plain)


def test_the_graph_changes_of_two_modules_in_one_call() -> None:
    pair = models.make(models.MLP), models.make(models.MLP, 1)

    def move(mdls: Any, x: jax.Array) -> jax.Array:
        a, b = mdls
        a.first, b.first = b.first, a.first
        return total(a, x) + total(b, x)

    firsts = [mdl.first for mdl in pair]
    lifted.grad(move, pair, X)
    assert [mdl.first for mdl in pair] == firsts[::-1]


# What stands by.

ADAM = optax.adam(1e-2)


def test_metrics_and_an_optimizer_beside_the_model() -> None:
    def make() -> Any:
        mdl = models.make(models.Norm)
        optimizer = nnx.Optimizer(mdl, ADAM, wrt=nnx.Param)
        return mdl, optimizer, nnx.metrics.Average()

    def fn(targets: Any, x: jax.Array) -> jax.Array:
        mdl, _, metric = targets
        y = total(mdl, x)
        metric.update(values=y)
        return y

    ours, plain = make(), make()
    grads, _ = lifted.grad(fn, ours, X, grad_variables=nnx.Param)
    fn(plain, X)
    assert_modules_equal(ours, plain)
    assert [len(jax.tree.leaves(g)) for g in grads] == [6, 0, 0]


def test_gradients_update_an_optimizer() -> None:
    mdl, plain = models.make(models.Norm), models.make(models.Norm)
    for target, grads in (
        (mdl, lifted.grad(total, mdl, X, grad_variables=nnx.Param)[0]),
        (plain, nnx.grad(total)(plain, X)),
    ):
        nnx.Optimizer(target, ADAM, wrt=nnx.Param).update(target, grads)
    assert_modules_equal(mdl, plain)


def test_an_optimizer_step_inside_fn() -> None:
    """A step of an inner loop, differentiated from outside."""

    def step(targets: Any, x: jax.Array) -> jax.Array:
        mdl, optimizer = targets
        grads, _ = lifted.grad(total, mdl, x, grad_variables=nnx.Param)
        optimizer.update(mdl, grads)
        return total(mdl, x)

    def make() -> Any:
        mdl = models.make(models.MLP)
        return mdl, nnx.Optimizer(mdl, ADAM, wrt=nnx.Param)

    ours, plain = make(), make()
    with strict():
        (actual,) = lifted.grad(step, ours, X)
    step(plain, X)
    assert_modules_equal(ours, plain)
    graphdef, state = nnx.split(make())
    expected = jax.grad(lambda x: step(nnx.merge(graphdef, state, copy=True), x))(X)
    assert_trees_close(actual, expected)


# Variables of a special kind.


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_hooks_run_as_in_a_plain_call() -> None:
    class Hooked(nnx.Module):
        def __init__(self) -> None:
            self.p = nnx.Param(jnp.ones(3), on_get_value=lambda v, x: 2 * x)
            self.n = nnx.Variable(jnp.zeros(()), on_set_value=lambda v, x: x + 1)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.n[...] = self.n[...] + 1
            return jnp.sum(self.p[...] * x)

    mdl, plain, x = Hooked(), Hooked(), jnp.arange(3.0)
    grads, _ = lifted.grad(call, mdl, x, grad_variables=nnx.Param)
    plain(x)
    assert mdl.n.get_raw_value() == plain.n.get_raw_value() == 2
    assert_trees_equal(grads["p"].get_raw_value(), 2 * x)


class Positive(nnx.Param[Any]):
    """Read and written through a function, by overloading."""

    def get_value(self, **kwargs: Any) -> Any:
        return jnp.exp(super().get_value(**kwargs))

    def set_value(self, value: Any, **kwargs: Any) -> None:
        super().set_value(jnp.log(value), **kwargs)


def test_a_variable_with_its_own_get_value_and_set_value() -> None:
    class Scaled(nnx.Module):
        def __init__(self) -> None:
            self.scale = Positive(jnp.zeros(3))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = jnp.sum(self.scale.get_value() * x)
            self.scale.set_value(2 * self.scale.get_value())
            return y

    mdl, plain, x = Scaled(), Scaled(), jnp.arange(3.0)
    grads, _ = lifted.grad(call, mdl, x, grad_variables=nnx.Param)
    plain(x)
    assert_trees_equal(mdl.scale.get_raw_value(), plain.scale.get_raw_value())
    assert_trees_equal(grads["scale"].get_raw_value(), x)


def test_metadata_stays_and_comes_with_the_gradient() -> None:
    mdl = models.make(models.MLP)
    mdl.first.kernel.set_metadata("out_sharding", ("model", None))
    grads, _ = lifted.grad(total, mdl, X, grad_variables=nnx.Param)
    assert mdl.first.kernel.out_sharding == grads["first"]["kernel"].out_sharding == ("model", None)


def test_a_variable_that_holds_a_pytree() -> None:
    class Tree(nnx.Module):
        def __init__(self) -> None:
            self.p = nnx.Param({"w": jnp.ones(3), "n": jnp.int32(2)})
            self.seen = nnx.Variable(nnx.data({"x": jnp.zeros(3)}))

        def __call__(self, x: jax.Array) -> jax.Array:
            p = self.p.get_value()
            self.seen.set_value({"x": x})
            return jnp.sum(p["w"] * x) * p["n"]

    mdl, x = Tree(), jnp.arange(3.0)
    with strict():
        grads, _ = lifted.grad(call, mdl, x, grad_variables=nnx.Param)
    assert_trees_equal(grads["p"].get_value()["w"], 2 * x)
    assert grads["p"].get_value()["n"].dtype == jax.dtypes.float0
    assert_trees_equal(mdl.seen.get_value(), {"x": x})


def test_bare_variables_are_targets() -> None:
    pair = nnx.Param(jnp.arange(3.0)), Count(jnp.zeros(()))

    def fn(variables: Any, x: jax.Array) -> jax.Array:
        weight, count = variables
        count[...] += 1
        return jnp.sum(weight[...] ** 2 * x)

    (weight_grad, count_grad), x_grad = lifted.grad(fn, pair, X[0], grad_variables=nnx.Param)
    assert_trees_equal(weight_grad.get_value(), 2 * pair[0][...] * X[0])
    assert_trees_equal(x_grad, pair[0][...] ** 2)
    assert count_grad is None
    assert pair[1][...] == 1


class Count(nnx.Variable[Any]):
    pass
