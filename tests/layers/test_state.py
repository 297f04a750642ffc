"""State: splitting, copying, compiling, saving and training a model with DropConnect."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import layers
from layers import DropConnectLinear

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def make(generator="default"):
    return DropConnectLinear.create(4, 5, 0.5, rngs=nnx.Rngs(0), generator=generator)


def call(model, x):
    return model(x)


@pytest.mark.parametrize(
    "transform", [lambda f: f, nnx.jit, nnx.remat], ids=["eager", "jit", "remat"]
)
def test_the_counter_moves_once_a_call(transform, generator):
    layer = make(generator)
    for expected in (1, 2, 3):
        transform(call)(layer, X)
        assert int(layer.rngs.count[...]) == expected


def test_the_counter_stands_still_when_deterministic():
    layer = make()
    layer(X, deterministic=True)
    assert int(layer.rngs.count[...]) == 0


def test_the_counter_moves_once_under_grad(generator):
    layer = make(generator)
    nnx.grad(lambda m: m(X).sum())(layer)
    assert int(layer.rngs.count[...]) == 1


def test_jit_draws_the_masks_of_eager_calls(generator):
    eager, compiled = make(generator), make(generator)
    for _ in range(3):
        # The compiled product may sum in another order.
        np.testing.assert_allclose(eager(X), nnx.jit(call)(compiled, X), rtol=1e-5, atol=1e-6)


def test_one_program_serves_all_steps():
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(None)
        return model(x)

    layer = make()
    for _ in range(3):
        step(layer, X)
    assert len(traces) == 1


def test_merging_a_split_continues_the_stream():
    layer = make()
    layer(X)
    copy = nnx.merge(*nnx.split(layer), copy=True)
    np.testing.assert_array_equal(copy(X), layer(X))


def test_a_clone_has_a_counter_of_its_own():
    layer = make()
    copy = nnx.clone(layer)
    copy(X)
    assert int(layer.rngs.count[...]) == 0 and int(copy.rngs.count[...]) == 1


def test_reseeding_repeats_the_masks():
    layer = DropConnectLinear.create(4, 5, 0.5, rngs=nnx.Rngs(params=0, dropconnect=1))
    nnx.reseed(layer, dropconnect=7)
    first = layer(X)
    nnx.reseed(layer, dropconnect=7)
    np.testing.assert_array_equal(layer(X), first)


def test_a_layer_without_a_stream_has_no_key_state():
    layer = DropConnectLinear(nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))


def replaced(seed):
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.LinearGeneral(6, 5, rngs=rngs)
    )
    only = (nnx.Linear, nnx.LinearGeneral)
    return layers.dropconnect(model, 0.5, only=only, keep_first=False, rngs=rngs)[0]


@pytest.mark.parametrize(
    "build",
    [lambda seed: DropConnectLinear.create(4, 5, 0.5, rngs=nnx.Rngs(seed)), replaced],
    ids=["layer", "model"],
)
def test_orbax_restores_weights_and_the_place_in_the_stream(build, tmp_path):
    import orbax.checkpoint as checkpoint

    layer = build(0)
    layer(X)

    def is_key(a):
        return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)

    def arrays(module):
        # Typed keys are saved as their words.
        state = nnx.to_pure_dict(nnx.state(module))
        return jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, state)

    def as_stored(like, a):
        return jax.random.wrap_key_data(a) if is_key(like) else a

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", arrays(layer))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", arrays(build(1)))
    other = build(99)
    nnx.update(other, jax.tree.map(as_stored, nnx.to_pure_dict(nnx.state(other)), restored))
    np.testing.assert_array_equal(other(X), layer(X))


def test_an_optimizer_step_moves_kept_weights_and_no_dropped_one(generator):
    layer = make(generator)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    before = layer.kernel[...]
    key = jax.random.fold_in(layer.rngs.key[...], layer.rngs.count[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
        optimizer.update(model, grads)

    step(layer, optimizer)
    mask = layers.keep_mask(key, (4, 5), 0.5, generator=generator)
    np.testing.assert_array_equal(layer.kernel[...] != before, mask)


def test_training_reduces_the_loss():
    model = nnx.Sequential(
        DropConnectLinear.create(4, 32, 0.2, rngs=nnx.Rngs(0)),
        nnx.relu,
        DropConnectLinear.create(32, 1, 0.2, rngs=nnx.Rngs(1)),
    )
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = x.sum(1, keepdims=True)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def loss(model):
        return ((model(x) - y) ** 2).mean()

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    def evaluated():
        return float(loss(nnx.view(model, deterministic=True)))

    before = evaluated()
    for _ in range(100):
        step(model, optimizer)
    assert evaluated() < 0.2 * before


def test_layers_built_under_vmap_run_under_scan(generator):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def build(rngs):
        return DropConnectLinear.create(4, 4, 0.5, rngs=rngs, generator=generator)

    stack = build(nnx.Rngs(0))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x)

    y = X
    for i in range(3):
        key = jax.random.fold_in(stack.rngs.key[...][i], 0)
        kernel = layers.drop_weight(stack.kernel[...][i], key, 0.5, generator=generator)
        y = y @ kernel + stack.bias[...][i]
    # The same products, fused in another way.
    np.testing.assert_allclose(forward(stack, X), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stack.rngs.count[...], [1, 1, 1])


def test_nnx_vmap_over_one_layer_and_split_streams_draws_a_mask_each():
    layer = make()

    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), None))
    def forward(layer, x):
        return layer(x)

    outputs = forward(layer, X)
    assert len({o.tobytes() for o in np.asarray(outputs)}) == 4


def test_it_can_be_captured_and_perturbed():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = make()

        def __call__(self, x):
            y = self.perturb("y", self.layer(x))
            self.sow(nnx.Intermediate, "y", y)
            return y

    model = Model()
    output, sown = nnx.capture(model, nnx.Intermediate)(X)
    np.testing.assert_array_equal(sown["y"][0], output)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this flax has no tree mode")
def test_tree_mode_serves_as_graph_mode_does():
    with nnx.set_graph_mode(False):
        layer = layers.WeightDrop(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
        eager = layer(X)
        layer.rngs.count[...] = 0
        compiled = nnx.jit(call)(layer, X)
    # The compiled product may sum in another order.
    np.testing.assert_allclose(eager, compiled, rtol=1e-5, atol=1e-6)
    assert int(layer.rngs.count[...]) == 1


def test_no_tracer_leaks():
    layer = make()
    with jax.checking_leaks():
        nnx.jit(lambda m, x: nnx.grad(lambda m: m(x).sum())(m))(layer, X)
