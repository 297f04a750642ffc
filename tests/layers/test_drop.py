"""The mechanism: values, derivatives and transformations, against the mask written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layers
from tests.helpers import assert_trees_equal

RATE = 0.3
RATES = [0.001, 0.01, 0.25, 0.5, 0.9, 0.999]
# Five standard errors: over the few hundred checks of this suite a false alarm is one in 10,000.
SIGMAS = 5.0


def written_out(weight, key, rate=RATE, generator="default"):
    """The rule with nothing of ours in it but the mask itself."""
    mask = layers.keep_mask(key, weight.shape, rate, generator=generator)
    scale = 1.0 / layers.keep_probability(rate, generator)
    return jnp.where(mask, weight * scale, 0.0)


def problem(key):
    x, w, c = (
        jax.random.normal(k, s)
        for k, s in zip(jax.random.split(key, 3), [(4, 9), (9, 5), (4, 5)], strict=True)
    )
    return x, w, c


def losses(key, generator):
    """The same loss through the mechanism and written out, as functions of inputs and weights."""
    c = problem(key)[2]

    def loss(drop, x, w):
        return (jnp.sin(x @ drop(w)) * c).sum()

    ours = functools.partial(layers.drop_weight, key=key, rate=RATE, generator=generator)
    raw = functools.partial(written_out, key=key, generator=generator)
    return functools.partial(loss, ours), functools.partial(loss, raw)


def test_values_are_the_mask_times_the_scale(key, generator):
    weight = jax.random.normal(key, (37, 11))
    ours = layers.drop_weight(weight, key, RATE, generator=generator)
    np.testing.assert_array_equal(ours, written_out(weight, key, generator=generator))


@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    rate=st.floats(0.0, 0.999),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "complex64"]),
    generator=st.sampled_from(["default", "fast", "bernoulli"]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_dtype_and_rate_gives_zero_or_the_scaled_weight(
    shape, rate, dtype, generator, seed
):
    key = jax.random.key(seed)
    dropped = layers.drop_weight(jnp.ones(shape, dtype), key, rate, generator=generator)
    assert dropped.shape == shape and dropped.dtype == dtype
    scale = jnp.asarray(1.0 / layers.keep_probability(rate, generator), "float32").astype(dtype)
    mask = layers.keep_mask(key, shape, rate, generator=generator)
    np.testing.assert_array_equal(dropped, jnp.where(mask, scale, jnp.zeros((), dtype)))


@pytest.mark.parametrize("rate", RATES)
def test_the_keep_rate_is_within_its_standard_error(rate, generator):
    size = 2**18
    kept = layers.keep_mask(jax.random.key(7), (512, 512), rate, generator=generator).sum()
    p = layers.keep_probability(rate, generator)
    assert abs(float(kept) - size * p) <= SIGMAS * np.sqrt(size * p * (1 - p))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]
)
def test_the_expectation_is_the_weight(rate, dtype):
    with jax.enable_x64("64" in dtype or "128" in dtype):
        weight = jax.random.uniform(jax.random.key(1), (512, 512), minval=0.5, maxval=1.0)
        weight = weight.astype(dtype)
        # The dtype meets the mask in one place, whichever generator made it.
        dropped = layers.drop_weight(weight, jax.random.key(2), rate, generator="fast")
    assert dropped.dtype == dtype
    exact, drawn = (np.asarray(a, "complex128") for a in (weight, dropped))
    p = layers.keep_probability(rate, "fast")
    error = np.sqrt((np.abs(exact) ** 2).sum() * (1 - p) / p)
    # The scaled weight is rounded once to its own dtype: no dtype holds 0.5 * 1.001 in 8 bits.
    rounding = np.abs(drawn).sum() * float(jnp.finfo(dtype).eps) / 2
    assert abs(drawn.sum() - exact.sum()) <= SIGMAS * error + rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_scaled_without_a_common_bias(dtype):
    # 1/0.9 in bfloat16 is 0.16 % off; rounding each product instead has mean error near zero.
    weight = jax.random.uniform(jax.random.key(1), (512, 512), minval=0.5).astype(dtype)
    dropped = layers.drop_weight(weight, jax.random.key(2), 0.1)
    kept = np.asarray(dropped, "float64") != 0
    ratio = np.asarray(dropped, "float64")[kept].sum() / np.asarray(weight, "float64")[kept].sum()
    assert abs(ratio * 0.9 - 1) < 1e-4


def test_a_dropped_weight_that_is_not_finite_is_gone(key):
    mask = layers.keep_mask(key, (8, 8), 0.5)
    weight = jnp.where(mask, 1.0, jnp.nan)
    assert jnp.isfinite(layers.drop_weight(weight, key, 0.5)).all()


def test_the_gradient_of_a_dropped_weight_is_exactly_zero(key, generator):
    x, w, _ = problem(key)
    ours, _ = losses(key, generator)
    gradient = jax.grad(ours, argnums=1)(x, w)
    mask = layers.keep_mask(key, w.shape, RATE, generator=generator)
    assert (gradient[~mask] == 0.0).all() and (gradient[mask] != 0.0).all()


@pytest.mark.parametrize("jit", [False, True])
def test_reverse_mode_equals_the_mask_written_out(key, generator, jit):
    x, w, _ = problem(key)
    grads = [jax.grad(f, argnums=(0, 1)) for f in losses(key, generator)]
    a, b = ((jax.jit(g) if jit else g)(x, w) for g in grads)
    assert_trees_equal(a, b)


@pytest.mark.parametrize("jit", [False, True])
def test_forward_mode_equals_the_mask_written_out(key, generator, jit):
    x, w, _ = problem(key)
    tangents = jnp.ones_like(x), jnp.cos(w)
    jvps = [functools.partial(jax.jvp, f) for f in losses(key, generator)]
    a, b = ((jax.jit(g) if jit else g)((x, w), tangents) for g in jvps)
    assert_trees_equal(a, b)


def test_forward_over_reverse_equals_the_mask_written_out(key, generator):
    x, w, _ = problem(key)

    def hvp(f):
        return jax.jvp(jax.grad(f, argnums=1), (x, w), (jnp.zeros_like(x), jnp.cos(w)))

    assert_trees_equal(*(hvp(f) for f in losses(key, generator)))


def test_reverse_over_reverse_equals_the_mask_written_out(key, generator):
    x, w, _ = problem(key)

    def norm(f):
        return jax.grad(lambda w: (jax.grad(f, argnums=1)(x, w) ** 2).sum())(w)

    assert_trees_equal(*(norm(f) for f in losses(key, generator)))


def test_the_adjoint_is_the_transpose_of_the_tangent(key, generator):
    weight = jax.random.normal(key, (16, 8))
    drop = functools.partial(layers.drop_weight, key=key, rate=RATE, generator=generator)
    u, v = jax.random.normal(jax.random.key(1), (2, 16, 8))
    _, forward = jax.jvp(drop, (weight,), (v,))
    (backward,) = jax.vjp(drop, weight)[1](u)
    # Two sums of 128 products each, in different orders.
    np.testing.assert_allclose((u * forward).sum(), (backward * v).sum(), rtol=1e-5, atol=1e-5)


def test_vmap_over_keys_draws_the_masks_of_the_keys(key, generator):
    keys = jax.random.split(key, 4)
    drop = functools.partial(layers.drop_weight, rate=RATE, generator=generator)
    weight = jnp.ones((9, 5))
    together = jax.vmap(drop, in_axes=(None, 0))(weight, keys)
    np.testing.assert_array_equal(together, jnp.stack([drop(weight, k) for k in keys]))


def test_vmap_over_weights_shares_one_mask(key, generator):
    weights = jnp.ones((3, 9, 5))
    drop = functools.partial(layers.drop_weight, key=key, rate=RATE, generator=generator)
    together = jax.vmap(drop)(weights)
    assert (together == drop(weights[0])).all()


def test_scan_over_keys_equals_a_python_loop_with_gradients(key, generator):
    x, w, _ = problem(key)
    keys = jax.random.split(key, 3)
    square = w @ w.T
    drop = functools.partial(layers.drop_weight, rate=RATE, generator=generator)

    def scanned(w):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ drop(w, k)), None), x, keys)[0].sum()

    def looped(w):
        h = x
        for k in keys:
            h = jnp.tanh(h @ drop(w, k))
        return h.sum()

    a, b = (jax.value_and_grad(f)(square) for f in (scanned, looped))
    # The loop adds three gradients of 36 terms in another order.
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), a, b)


def test_jit_changes_no_bit(key, generator):
    weight = jax.random.normal(key, (33, 7))
    drop = functools.partial(layers.drop_weight, rate=RATE, generator=generator)
    np.testing.assert_array_equal(jax.jit(drop)(weight, key), drop(weight, key))


def test_sixty_four_bit_types_change_no_mask_bit(key, generator):
    plain = layers.keep_mask(key, (33, 7), RATE, generator=generator)
    with jax.enable_x64(True):
        wide = layers.keep_mask(key, (33, 7), RATE, generator=generator)
        weight = jnp.ones((33, 7), "float64")
        dropped = layers.drop_weight(weight, key, RATE, generator=generator)
    np.testing.assert_array_equal(plain, wide)
    scale = 1.0 / layers.keep_probability(RATE, generator)
    np.testing.assert_array_equal(dropped, np.where(plain, scale, 0.0))


def test_no_tracer_leaks(key, generator):
    x, w, _ = problem(key)
    with jax.checking_leaks():
        jax.jit(jax.grad(losses(key, generator)[0], argnums=1))(x, w)


def test_rate_zero_returns_the_weight_itself(key, generator):
    weight = jnp.ones((3, 3))
    assert layers.drop_weight(weight, key, 0.0, generator=generator) is weight
    assert layers.keep_mask(key, (3, 3), 0.0, generator=generator).all()
