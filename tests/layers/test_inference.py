"""Gaussian inference and Monte-Carlo prediction."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import DropConnectLinear, gaussian_moments, gaussian_predict, mc_predict


def make(rate=0.25, rngs=0, **options):
    layer = DropConnectLinear.create(3, 2, rate, rngs=nnx.Rngs(rngs), **options)
    layer.bias[...] = jnp.array([0.5, -0.5])
    return layer


def all_masks(layer, x):
    """Mean and variance over every mask, by enumeration."""
    keep, scale = 1 - layer.rate, 1 / (1 - layer.rate)
    mean, square = 0.0, 0.0
    for bits in itertools.product([0, 1], repeat=6):
        mask = np.array(bits).reshape(3, 2)
        p = keep ** mask.sum() * (1 - keep) ** (6 - mask.sum())
        y = np.asarray(x) @ (np.asarray(layer.kernel[...]) * mask * scale) + layer.bias[...]
        mean, square = mean + p * y, square + p * y**2
    return mean, square - mean**2


X = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.3, 3.0]])


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_the_moments_are_those_of_all_masks(rate):
    layer = make(rate)
    for ours, exact in zip(gaussian_moments(layer, X), all_masks(layer, X), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_the_moments_do_not_depend_on_the_mode_or_need_a_key():
    layer = make()
    layer.eval()
    a = gaussian_moments(layer, X)
    layer.train()
    np.testing.assert_array_equal(a, gaussian_moments(layer, X))
    assert int(layer.rngs.count[...]) == 0


def test_rate_zero_has_no_variance():
    assert (gaussian_moments(make(0.0), X)[1] == 0).all()


def test_the_expected_relu_is_that_of_the_gaussian(key):
    layer = make(0.5)
    mean, variance = (np.asarray(m, "float64") for m in gaussian_moments(layer, X))
    stats = pytest.importorskip("scipy.stats")
    s = np.sqrt(variance)
    exact = mean * stats.norm.cdf(mean / s) + s * stats.norm.pdf(mean / s)
    drawn = gaussian_predict(layer, X, nnx.relu, num_samples=20_000, key=key)
    # A rectified Gaussian varies no more than the Gaussian: five standard errors.
    assert (np.abs(drawn - exact) < 5 * s / np.sqrt(20_000)).all()


def test_an_activation_along_an_axis_averages_to_probabilities(key):
    drawn = gaussian_predict(make(), X, jax.nn.softmax, num_samples=10, key=key)
    np.testing.assert_allclose(drawn.sum(-1), 1.0, rtol=1e-6)


def test_the_prediction_is_differentiable_where_the_variance_is_zero(key):
    def predicted(x):
        return gaussian_predict(make(), x, nnx.relu, num_samples=4, key=key).sum()

    assert jnp.isfinite(jax.grad(predicted)(jnp.zeros((1, 3)))).all()


def test_the_mean_of_half_precision_is_summed_in_float32(key):
    layer = make(dtype=jnp.bfloat16)
    # In bfloat16 a sum of ones stands still at 256.
    ones = gaussian_predict(layer, X, jnp.ones_like, num_samples=1000, key=key)
    assert ones.dtype == jnp.bfloat16 and (ones == 1).all()


def test_a_count_may_be_a_numpy_integer(key):
    count = np.int64(3)
    assert mc_predict(make(), X, num_samples=count, key=key, batch_size=count).mean.shape == (2, 2)
    assert gaussian_predict(make(), X, nnx.relu, num_samples=count, key=key).shape == (2, 2)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_gaussian_predict_wants_a_positive_count(samples, key):
    with pytest.raises(ValueError, match="num_samples must be an int of at least 1"):
        gaussian_predict(make(), X, nnx.relu, num_samples=samples, key=key)


def test_gaussian_moments_want_a_dropconnect_layer():
    with pytest.raises(TypeError, match="layer must be a DropConnectLinear, got Linear"):
        gaussian_moments(make().to_linear(), X)


# Monte Carlo.


def model():
    return nnx.Sequential(make(0.5), nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.relu)


def evaluated():
    m = model()
    m.eval()
    return m


def test_mean_and_variance_converge_to_the_exact_moments(key):
    layer = make()
    result = mc_predict(layer, X, num_samples=4000, key=key, batch_size=100)
    mean, variance = gaussian_moments(layer, X)
    assert (jnp.abs(result.mean - mean) < 5 * jnp.sqrt(variance / 4000)).all()
    # The fourth moment of a sum of three bounded terms is below twice that of a Gaussian.
    assert (jnp.abs(result.variance - variance) < 5 * variance * np.sqrt(5 / 4000)).all()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_samples_do_not_depend_on_the_batch_size(batch_size, key):
    a, b = (
        mc_predict(model(), X, num_samples=7, key=key, batch_size=n, return_samples=True)
        for n in (7, batch_size)
    )
    np.testing.assert_allclose(a.samples, b.samples, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-4, atol=1e-6)


def test_mean_and_variance_are_those_of_the_samples(key):
    result = mc_predict(model(), X, num_samples=23, key=key, batch_size=5, return_samples=True)
    np.testing.assert_allclose(result.mean, result.samples.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.variance, result.samples.var(0, ddof=1), rtol=1e-4, atol=1e-6)


def test_one_sample_has_no_variance(key):
    result = mc_predict(make(), X, num_samples=1, key=key)
    assert (result.variance == 0).all() and result.samples is None


def test_a_large_mean_does_not_swamp_the_variance(key):
    layer = make()
    exact = gaussian_moments(layer, X)[1]
    layer.bias[...] += 1e4
    variance = mc_predict(layer, X, num_samples=500, key=key).variance
    # float32 resolves 1e4 to 0.001; a sum of squares less a squared mean would be noise of order 8.
    np.testing.assert_allclose(variance, exact, rtol=0.5)


def test_the_model_is_not_touched(key):
    m = evaluated()
    before = jax.tree.leaves(nnx.state(m))
    mc_predict(m, X, num_samples=3, key=key)
    for a, b in zip(before, jax.tree.leaves(nnx.state(m)), strict=True):
        assert a is b
    assert m.layers[0].deterministic


def test_masks_are_on_in_an_evaluated_model_and_nothing_else(key):
    result = mc_predict(evaluated(), X, num_samples=20, key=key)
    # With the batch statistics of evaluation, one example does not depend on the other.
    alone = mc_predict(evaluated(), X[:1], num_samples=20, key=key)
    np.testing.assert_allclose(result.mean[:1], alone.mean, rtol=1e-5)
    assert (result.variance > 0).any()


def test_no_stream_is_needed(key):
    layer = DropConnectLinear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), 0.5)
    assert (mc_predict(layer, X, num_samples=5, key=key).variance > 0).any()


def test_dropout_can_be_sampled_too(key):
    m = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
    m.eval()
    result = mc_predict(m, X, num_samples=9, key=key, stochastic=nnx.Dropout)
    assert (result.variance > 0).any()


def test_dropout_of_an_evaluated_model_stays_off(key):
    m = nnx.Sequential(make(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    m.eval()
    result = mc_predict(m, X, num_samples=9, key=key, return_samples=True)
    # Only Dropout makes an exact zero: the biases are none.
    assert (result.samples != 0).all() and (result.variance > 0).any()


def test_layers_draw_masks_of_their_own(key):
    square = nnx.Linear(3, 3, use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    a, b = (DropConnectLinear(square, 0.5) for _ in range(2))

    def both(pair, x):
        return jnp.stack([pair[0](x), pair[1](x)])

    result = mc_predict(nnx.List([a, b]), X, num_samples=8, key=key, fn=both, return_samples=True)
    assert (result.samples[:, 0] != result.samples[:, 1]).any()


def test_fn_and_keywords_and_trees_of_outputs(key):
    def fn(m, x, *, factor):
        return {"y": m(x) * factor, "p": jax.nn.softmax(m(x))}

    result = mc_predict(make(), X, num_samples=4, key=key, fn=fn, factor=0.0)
    assert (result.mean["y"] == 0).all()
    np.testing.assert_allclose(result.mean["p"].sum(-1), 1.0, rtol=1e-6)


def test_a_second_call_compiles_nothing(key):
    traces = []

    def fn(m, x, *, scale):
        traces.append(None)
        return m(x) * scale

    layer = make()
    for seed in range(3):
        mc_predict(layer, X, num_samples=4, key=jax.random.key(seed), fn=fn, scale=2)
    # The shape of the output is found in one trace, the loop made in another.
    assert len(traces) == 2


def test_half_precision_is_accumulated_in_float32(key):
    layer = make(dtype=jnp.bfloat16)
    result = mc_predict(layer, X, num_samples=1000, key=key)
    assert result.mean.dtype == result.variance.dtype == jnp.bfloat16
    mean, variance = gaussian_moments(make(), X)
    bound = 5 * jnp.sqrt(variance / 1000) + 0.02 * (1 + jnp.abs(mean))
    assert (jnp.abs(result.mean.astype("float32") - mean) < bound).all()


def test_it_compiles_and_differentiates(key):
    layer = make()
    graphdef, state = nnx.split(layer)

    @jax.jit
    def spread(x):
        return mc_predict(nnx.merge(graphdef, state), x, num_samples=4, key=key).variance.sum()

    assert jnp.isfinite(jax.grad(spread)(X)).all()


def test_memory_does_not_grow_with_the_number_of_samples(key):
    layer = DropConnectLinear(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), 0.5)
    x = jnp.ones((32, 64))

    def bytes_for(n, **options):
        fn = jax.jit(lambda x: mc_predict(layer, x, num_samples=n, key=key, **options))
        return fn.lower(x).compile().memory_analysis().temp_size_in_bytes

    # The chunk is 8 either way; what grows is the list of its starting indices.
    assert bytes_for(4096) <= bytes_for(64) + 4 * 4096 // 8


@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
def test_counts_are_checked(name, key):
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got 0"):
        mc_predict(make(), X, **{"num_samples": 3, "key": key, name: 0})


def test_a_model_without_masks_is_an_error(key):
    with pytest.raises(ValueError, match="selects no module with masks.*layers.dropconnect"):
        mc_predict(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X, num_samples=3, key=key)


def test_integer_outputs_are_an_error(key):
    with pytest.raises(TypeError, match="must be floating or complex.*int32"):
        mc_predict(make(), X, num_samples=3, key=key, fn=lambda m, x: m(x).argmax(-1))
