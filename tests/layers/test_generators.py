"""Where the bits come from: identity with JAX's, and the quality of ours.

Every statistical test runs at a fixed key and asks for a p-value above 1e-6; with some hundred of
them, a sound generator fails once in ten thousand choices of keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layers
from layers._generators import GENERATORS, counter, hash_words, key_words, mix, threefry

stats = pytest.importorskip("scipy.stats")
ALPHA = 1e-6
OURS = pytest.mark.parametrize("generator", ["default", "fast"])
WORDS = {
    "default": lambda key, shape: jnp.concatenate(threefry(key_words(key), counter(shape))),
    "fast": lambda key, shape: hash_words(GENERATORS["fast"].draw(key, shape, 0.5), counter(shape)),
}


def mask(generator, shape=(512, 512), rate=0.25, seed=0):
    """A mask as numbers of mean zero and variance one."""
    kept = layers.keep_mask(jax.random.key(seed), shape, rate, generator=generator)
    p = layers.keep_probability(rate, generator)
    return (np.asarray(kept, "float64") - p) / np.sqrt(p * (1 - p))


def assert_uncorrelated(a, b):
    """Products of independent standardised bits have mean 0 and variance 1."""
    z = (a * b).sum() / np.sqrt(a.size)
    assert 2 * stats.norm.sf(abs(z)) > ALPHA


def test_threefry_is_jaxs_own(key):
    # JAX gives the exclusive or of the two words of a block.
    first, second = threefry(key_words(key), counter((7, 9)))
    np.testing.assert_array_equal(first ^ second, jax.random.bits(key, (7, 9), "uint32"))


@pytest.mark.parametrize("shape", [(5,), (17, 9), (3, 3, 4, 8), ()])
@pytest.mark.parametrize("rate", [0.001, 0.3, 0.9])
def test_bernoulli_has_exactly_jaxs_bits(key, shape, rate):
    ours = layers.keep_mask(key, shape, rate, generator="bernoulli")
    np.testing.assert_array_equal(ours, jax.random.bernoulli(key, 1.0 - rate, shape))


@pytest.mark.parametrize("impl, partitionable", [("rbg", True), ("threefry2x32", False)])
def test_bernoulli_has_jaxs_bits_of_other_keys_and_in_its_older_form(impl, partitionable):
    key = jax.random.key(3, impl=impl)
    with jax.threefry_partitionable(partitionable):
        ours = layers.keep_mask(key, (17, 9), 0.3, generator="bernoulli")
        np.testing.assert_array_equal(ours, jax.random.bernoulli(key, 0.7, (17, 9)))


def test_the_masks_of_a_key_do_not_change_between_releases():
    # A checkpoint that holds a key holds the masks that follow from it: these are a promise.
    drawn = {
        name: "".join(
            "01"[int(bit)]
            for bit in layers.keep_mask(jax.random.key(1), (4, 8), 0.5, generator=name).ravel()
        )
        for name in ("default", "fast")
    }
    assert drawn == {
        "default": "11001001100001101111000110111110",
        "fast": "00000011110100100111101001000010",
    }


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_key_implementation_of_jax_serves(impl, generator):
    a, b = (jax.random.key(seed, impl=impl) for seed in (0, 1))
    masks = [layers.keep_mask(k, (64, 64), 0.5, generator=generator) for k in (a, b)]
    assert abs(float((masks[0] == masks[1]).mean()) - 0.5) < 5 * 0.5 / 64


def test_every_word_of_a_long_key_matters():
    data = jax.random.key_data(jax.random.key(0, impl="rbg"))
    masks = set()
    for i in range(4):
        key = jax.random.wrap_key_data(data.at[i].add(1), impl="rbg")
        masks.add(layers.keep_mask(key, (8, 8), 0.5).tobytes())
    assert len(masks) == 4


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_the_counter_is_the_row_major_position(shape, first):
    high, low = counter(tuple(shape), first=np.uint32(first))
    low = low - np.uint32(first)
    np.testing.assert_array_equal(low.ravel(), np.arange(np.prod(shape)))
    assert (high == 0).all()


def test_the_counter_of_a_huge_array_goes_on_in_its_high_word():
    shape = (3, 2**16, 2**16)
    high, low = jax.eval_shape(lambda: counter(shape))
    assert high.shape == low.shape == shape
    # The same axes, of which only a corner is made.
    corner = jax.jit(lambda: [word[2, -1, -2:] for word in counter(shape)])()
    np.testing.assert_array_equal(corner[0], [2, 2])
    np.testing.assert_array_equal(corner[1], [2**32 - 2, 2**32 - 1])


def test_the_mixer_is_a_bijection_on_a_sample():
    words = mix(jnp.arange(2**18, dtype="uint32"))
    assert len(np.unique(words)) == 2**18


def test_each_input_bit_of_the_mixer_moves_each_output_bit_about_half_the_time():
    words = jax.random.bits(jax.random.key(0), (2**14,), "uint32")
    for bit in range(32):
        flipped = np.asarray(mix(words) ^ mix(words ^ jnp.uint32(1 << bit)))
        share = (flipped[:, None] >> np.arange(32, dtype="uint32") & 1).mean(0)
        # The mixer's own known bias is below 2 %; the sample adds five standard errors of 0.4 %.
        assert np.abs(share - 0.5).max() < 0.04


@OURS
@pytest.mark.parametrize("byte", range(4))
def test_each_byte_of_the_words_is_uniform(generator, byte):
    words = np.asarray(WORDS[generator](jax.random.key(byte), (512, 256)))
    counts = np.bincount((words.ravel() >> np.uint32(8 * byte)) & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > ALPHA


@OURS
def test_the_words_pass_kolmogorov_smirnov(generator):
    words = np.asarray(WORDS[generator](jax.random.key(5), (300, 300))).ravel()
    assert stats.kstest(words / 2.0**32, "uniform").pvalue > ALPHA


@OURS
@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 8), (8, 0), (1, -1)])
def test_neighbouring_weights_are_independent(generator, lag):
    m = mask(generator)
    assert_uncorrelated(m, np.roll(m, lag, (0, 1)))


@OURS
@pytest.mark.parametrize("distance", [2**k for k in range(3, 9)])
def test_weights_a_power_of_two_apart_are_independent(generator, distance):
    m = mask(generator).ravel()
    assert_uncorrelated(m[:-distance], m[distance:])


@OURS
def test_rows_and_columns_are_kept_equally_often(generator):
    m = mask(generator, rate=0.5)
    for sums in (m.sum(0), m.sum(1)):
        assert stats.kstest(sums / np.sqrt(m.shape[0]), "norm").pvalue > ALPHA
        chi = (sums**2).sum() / m.shape[0]
        assert ALPHA < stats.chi2.cdf(chi, len(sums)) < 1 - ALPHA


@OURS
def test_all_pairs_of_rows_are_uncorrelated(generator):
    m = mask(generator, (256, 512), rate=0.5)
    products = (m @ m.T)[np.triu_indices(256, 1)] / np.sqrt(512)
    assert 2 * stats.norm.sf(np.abs(products).max()) * products.size > ALPHA
    # The fourth moment too: a few strongly tied pairs would show in it.
    z = ((products**2).mean() - 1) / np.sqrt(2 / products.size)
    assert abs(z) < 6


@OURS
def test_steps_of_a_stream_draw_independent_masks(generator):
    root = jax.random.key(3)
    draws = [jax.random.fold_in(root, step) for step in range(9)]
    masks = [layers.keep_mask(k, (256, 256), 0.25, generator=generator) for k in draws]
    p = 0.75
    flat = [(np.asarray(m, "float64") - p) / np.sqrt(p * (1 - p)) for m in masks]
    for a, b in zip(flat, flat[1:], strict=False):
        assert_uncorrelated(a, b)


@OURS
@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("bit", [0, 1, 5, 16, 31])
def test_keys_that_differ_in_one_bit_draw_independent_masks(generator, word, bit):
    data = jax.random.key_data(jax.random.key(11))
    near = data.at[word].set(data[word] ^ jnp.uint32(1 << bit))
    a, b = (
        np.asarray(layers.keep_mask(d, (256, 256), 0.5, generator=generator), "float64") * 2 - 1
        for d in (data, near)
    )
    assert_uncorrelated(a, b)
    # Nor is one the other, shifted.
    for shift in (1, 2, 256):
        assert_uncorrelated(a.ravel()[shift:], b.ravel()[:-shift])


@OURS
def test_small_consecutive_seeds_draw_independent_masks(generator):
    masks = np.stack([mask(generator, (64, 64), 0.5, seed).ravel() for seed in range(32)])
    products = (masks @ masks.T)[np.triu_indices(32, 1)] / np.sqrt(masks.shape[1])
    assert 2 * stats.norm.sf(np.abs(products).max()) * products.size > ALPHA


# A battery of counts on the bits of a mask of rate 1/2, after NIST SP 800-22.


def bits(generator):
    return (mask(generator, rate=0.5, seed=99).ravel() > 0).astype(int)


@OURS
def test_battery_frequency_within_blocks(generator):
    blocks = bits(generator).reshape(-1, 128).mean(1)
    assert stats.chi2.sf(4 * 128 * ((blocks - 0.5) ** 2).sum(), len(blocks)) > ALPHA


@OURS
def test_battery_runs(generator):
    b = bits(generator)
    runs, p, n = 1 + (b[1:] != b[:-1]).sum(), b.mean(), b.size
    z = (runs - 2 * n * p * (1 - p)) / (2 * np.sqrt(n) * p * (1 - p))
    assert 2 * stats.norm.sf(abs(z)) > ALPHA


@OURS
def test_battery_patterns_of_eight(generator):
    words = np.packbits(bits(generator).reshape(-1, 8), axis=1).ravel()
    assert stats.chisquare(np.bincount(words, minlength=256)).pvalue > ALPHA


@OURS
def test_battery_ranks_of_binary_matrices(generator):
    matrices = bits(generator)[: 32 * 32 * 200].reshape(200, 32, 32)
    full = sum(binary_rank(m) == 32 for m in matrices)
    # Probability that a random 32 by 32 matrix over two elements has full rank.
    p = np.prod(1 - 2.0 ** -np.arange(1, 33))
    assert stats.binomtest(full, 200, p).pvalue > ALPHA


def binary_rank(matrix):
    rows, rank = [int("".join(map(str, row)), 2) for row in matrix], 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return rank


@OURS
def test_battery_spectrum(generator):
    b = 2 * bits(generator) - 1
    power = np.abs(np.fft.rfft(b)[1:-1]) ** 2 / b.size
    # Under independence the power at each frequency is exponential of mean one.
    assert stats.kstest(power, "expon").pvalue > ALPHA


@OURS
def test_battery_cumulative_sums(generator):
    walk = np.cumsum(2 * bits(generator) - 1)
    # Reflection: P(max |S| > z sqrt(n)) <= 4 P(N > z).
    assert 4 * stats.norm.sf(np.abs(walk).max() / np.sqrt(walk.size)) > ALPHA


@OURS
def test_battery_birthday_spacings_of_words(generator):
    words = np.asarray(WORDS[generator](jax.random.key(2), (64, 64))).ravel().astype("int64")
    # n days in a year of 2**32: repeated spacings are Poisson with mean n**3 / (4 * 2**32).
    days = np.sort(words)
    spacings = np.sort(np.diff(days))
    repeats, mean = (np.diff(spacings) == 0).sum(), len(days) ** 3 / 2.0**34
    assert stats.poisson.sf(repeats - 1, mean) > ALPHA and stats.poisson.cdf(repeats, mean) > ALPHA
