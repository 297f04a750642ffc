"""Layers in odd company: transforms in any order, inherited methods, unusual inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import layers
from layers import DropConnectLinear, WeightDrop
from tests.helpers import assert_trees_close, assert_trees_equal, normal, strict

X = normal(3, 4)
KINDS = {
    "linear": lambda rngs: DropConnectLinear.create(4, 4, 0.5, rngs=rngs),
    "per example": lambda rngs: DropConnectLinear.create(4, 4, 0.5, rngs=rngs, per_example=True),
    "wrapped": lambda rngs: WeightDrop(nnx.Linear(4, 4, rngs=rngs), 0.5, rngs=rngs),
}


@pytest.fixture(params=KINDS)
def build(request):
    return KINDS[request.param]


def call(layer, x):
    return layer(x)


def test_derivatives_of_a_layer_equal_the_mask_written_out_exactly(generator, key):
    layer = DropConnectLinear.create(4, 5, 0.3, rngs=nnx.Rngs(0), generator=generator)
    mask = layers.keep_mask(key, (4, 5), 0.3, generator=generator)
    scale = 1 / layers.keep_probability(0.3, generator)
    cotangent = normal(3, 5, seed=5)

    def ours(kernel, bias, x):
        copy = nnx.clone(layer)
        copy.kernel, copy.bias = nnx.Param(kernel), nnx.Param(bias)
        return (jnp.sin(copy(x, rngs=key)) * cotangent).sum()

    def raw(kernel, bias, x):
        return (jnp.sin(x @ jnp.where(mask, kernel * scale, 0.0) + bias) * cotangent).sum()

    def derivatives(fn, *args):
        gradient = jax.grad(fn, argnums=(0, 1, 2))
        direction = jax.tree.map(jnp.cos, args)
        return gradient(*args), jax.jvp(fn, args, direction), jax.jvp(gradient, args, direction)

    args = (layer.kernel[...], normal(5), X)
    for of in (derivatives, jax.jit(derivatives, static_argnums=0)):
        assert_trees_equal(of(ours, *args), of(raw, *args))


def stack_of(build, length):
    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def make(rngs):
        return build(rngs)

    return make(nnx.Rngs(0))


def slices(stack, length):
    graphdef, state = nnx.split(stack)
    return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(length)]


def loop(stack, x):
    for layer in slices(stack, 3):
        x = jnp.tanh(layer(x))
    return x


def scan(body):
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)


def step(layer, x):
    return jnp.tanh(layer(x))


ORDERS = {
    "scan of remat": scan(nnx.remat(step)),
    "remat of scan": nnx.remat(scan(step)),
    "jit of scan of jit": nnx.jit(scan(nnx.jit(step))),
    "scan of remat of vmap": scan(
        nnx.remat(lambda layer, x: jnp.tanh(layer(jax.vmap(lambda row: 1.0 * row)(x))))
    ),
    "scan of grad": scan(lambda layer, x: step(layer, x) + 0 * nnx.grad(lambda x: (x**2).sum())(x)),
}


@pytest.mark.parametrize("forward", ORDERS.values(), ids=ORDERS)
def test_stacked_layers_under_transforms_in_any_order_equal_a_loop(forward, build):
    stack = stack_of(build, 3)
    expected = loop(nnx.clone(stack), X)
    assert_trees_close(forward(stack, X), expected)
    np.testing.assert_array_equal(stack.rngs.count[...], [1, 1, 1])


def test_gradients_of_stacked_layers_equal_those_of_a_loop(build):
    # Streams are copied, so that both draw the same masks.
    ours, other = (stack_of(build, 3) for _ in range(2))
    gradient = nnx.jit(nnx.grad(lambda m: (ORDERS["scan of remat"](m, X) ** 2).sum()))(ours)
    assert_trees_close(gradient, nnx.grad(lambda m: (loop(m, X) ** 2).sum())(other), factor=4)
    np.testing.assert_array_equal(ours.rngs.count[...], [1, 1, 1])


def test_each_layer_and_each_call_of_a_stack_has_another_mask(build):
    stack = stack_of(build, 3)
    outputs = [layer(X) for layer in slices(stack, 3)]
    ORDERS["scan of remat"](stack, X)
    outputs += [layer(X) for layer in slices(stack, 3)]
    assert len({np.asarray(y).tobytes() for y in outputs}) == 6


def test_a_call_inside_a_loop_moves_the_counter_each_time(build):
    layer = build(nnx.Rngs(0))
    copy, x = nnx.clone(layer), X
    for _ in range(3):
        x = step(copy, x)
    _, y = nnx.fori_loop(0, 3, lambda i, c: (c[0], step(*c)), (layer, X))
    assert_trees_close(y, x)
    assert int(layer.rngs.count[...]) == 3


@pytest.mark.parametrize("taken, count", [(True, 1), (False, 0)])
def test_a_branch_that_is_not_taken_draws_nothing(taken, count, build):
    layer = build(nnx.Rngs(0))
    before = int(layer.rngs.count[...])
    nnx.cond(taken, call, lambda layer, x: x, layer, X)
    assert int(layer.rngs.count[...]) - before == count


def test_vmap_over_keys_of_a_layer_equals_a_loop(build, key):
    layer, keys = build(nnx.Rngs(0)), jax.random.split(key, 4)
    together = jax.vmap(lambda k: layer(X, rngs=k))(keys)
    assert_trees_close(together, jnp.stack([layer(X, rngs=k) for k in keys]))


def test_checks_of_jax_pass_in_a_training_step(build):
    layer = build(nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda m: (m(X) ** 2).sum())(layer))

    before = nnx.clone(layer)
    with strict():
        train(layer, optimizer)
    changed = jax.tree.map(
        lambda a, b: (a != b).any(), *(nnx.state(m, nnx.Param) for m in (layer, before))
    )
    assert all(jax.tree.leaves(changed))


# Inherited methods, as documented.


class Traced(DropConnectLinear):
    """Sows its output and perturbs it."""

    def __call__(self, inputs, **options):
        y = self.perturb("y", super().__call__(inputs, **options))
        self.sow(nnx.Intermediate, "y", y)
        return y


def test_a_layer_can_sow_and_perturb(key):
    layer = Traced(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), 0.5)
    _, perturbations = nnx.capture(layer, nnx.Perturbation)(X, rngs=key)

    def loss(layer, perturbations):
        y, sown = nnx.capture(layer, nnx.Intermediate, init=perturbations)(X, rngs=key)
        return (y**2).sum(), (y, sown)

    gradient, (y, sown) = nnx.grad(loss, argnums=1, has_aux=True)(layer, perturbations)
    np.testing.assert_array_equal(sown["y"][0], y)
    np.testing.assert_array_equal(gradient["y"][...], 2 * y)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_layer_lists_its_children_and_modules(build):
    layer = build(nnx.Rngs(0))
    assert dict(layer.iter_modules())[()] is layer is dict(nnx.iter_modules(layer))[()]
    assert list(layer.iter_children()) == list(nnx.iter_children(layer))


def test_eval_train_and_set_attributes_take_further_attributes(build):
    layer = build(nnx.Rngs(0))
    layer.eval(rate=0.1)
    assert layer.deterministic is True and layer.rate == 0.1
    layer.train(rate=0.2)
    assert layer.deterministic is False and layer.rate == 0.2
    layer.set_attributes(layers.DropConnectModule, rate=0.3)
    assert layer.rate == 0.3
    with pytest.raises(ValueError, match="nothing"):
        layer.set_attributes(nothing=1)
    layer.set_attributes(nothing=1, raise_if_not_found=False)


# Unusual inputs.


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (2, 3, 1, 4)])
def test_every_shape_of_inputs_has_the_shape_of_the_plain_layer(shape, build):
    layer, x = build(nnx.Rngs(0)), normal(*shape)
    assert layer(x).shape == layer(x, deterministic=True).shape == shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"])
def test_every_dtype_of_params_keeps_its_dtype_and_its_zeros(dtype, key, generator):
    linear = nnx.Linear(8, 8, param_dtype=dtype, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.ones((8, 8), dtype))
    layer = DropConnectLinear(linear, 0.5, generator=generator)
    y = layer(jnp.eye(8, dtype=dtype), rngs=key)
    mask = layers.keep_mask(key, (8, 8), 0.5, generator=generator)
    assert y.dtype == linear(jnp.eye(8, dtype=dtype)).dtype
    np.testing.assert_array_equal(y.astype("complex64"), jnp.where(mask, 2.0, 0.0))


@pytest.mark.parametrize("rate", [1e-12, 0.001, 0.999, float(np.nextafter(1.0, 0.0))])
def test_extreme_rates_give_finite_outputs_and_gradients(rate, key, generator):
    layer = DropConnectLinear.create(64, 64, rate, rngs=nnx.Rngs(0), generator=generator)
    x = normal(2, 64)
    gradient = nnx.grad(lambda m: (m(x, rngs=key) ** 2).sum())(layer)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_wrapped_layers_may_be_wrapped_and_copied_again():
    inner = DropConnectLinear.create(4, 4, 0.5, rngs=nnx.Rngs(0))
    outer = WeightDrop(WeightDrop(inner, 0.5, rngs=nnx.Rngs(1)), 0.5, rngs=nnx.Rngs(2))
    assert outer(X).shape == (3, 4)
    counts = [m.rngs.count[...] for m in (inner, outer.base_layer, outer)]
    assert counts == [1, 1, 1]
