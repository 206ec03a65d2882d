import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.data.randomness import bits, key, permute, random_uint32, uniform


def deviation(counts, expected):
    """Chi-square, in standard deviations from its expected value."""
    counts = np.asarray(counts)
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_bits_match_splitmix64():
    # The first outputs of the published generator seeded with 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    np.testing.assert_array_equal(bits(np.array(0, np.uint64), np.arange(3)), np.array(expected, np.uint64))


def test_keys_differ_by_seed_and_name_and_stay_the_same_across_versions():
    keys = [int(key(seed, name)) for seed in (0, 1, 10) for name in ("a", "b", "0 a")]
    assert len(set(keys)) == len(keys)
    assert int(key(0, "a")) == 0x2C8C3A1C45B5EAA9


@pytest.mark.parametrize("flip", ["key", "counter"])
def test_avalanche(flip):
    """Flipping any bit of the key or the counter flips each bit of the result in half of the cases."""
    n = 2000
    keys = bits(key(0, "avalanche"), np.arange(n))
    counters = np.arange(n, dtype=np.uint64)
    plain = bits(keys, counters)
    for bit in range(64):
        mask = np.uint64(1) << np.uint64(bit)
        other = bits(keys ^ mask, counters) if flip == "key" else bits(keys, counters ^ mask)
        flipped = np.unpackbits((plain ^ other).view(np.uint8)).reshape(n, 64)
        assert abs(flipped.mean() - 0.5) < 0.01
        assert np.abs(flipped.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("along", ["counters", "keys"])
def test_uniform(along):
    n = 100_000
    if along == "counters":
        values = uniform(key(0, "uniform"), np.arange(n))
    else:
        values = uniform(bits(key(0, "uniform"), np.arange(n)), 7)
    assert values.min() >= 0 and values.max() < 1
    assert abs(deviation(np.bincount((values * 256).astype(int), minlength=256), n / 256)) < 4
    successive = (values[:-1:2] * 16).astype(int) * 16 + (values[1::2] * 16).astype(int)
    assert abs(deviation(np.bincount(successive, minlength=256), n / 512)) < 4


def test_random_uint32_do_not_depend_on_their_number():
    keys = bits(key(0, "words"), np.arange(50))
    many = random_uint32(keys, 1000)
    assert many.shape == (50, 1000) and many.dtype == np.uint32
    np.testing.assert_array_equal(random_uint32(keys[3:5], 7), many[3:5, :7])
    for shift in (0, 8, 16, 24):
        assert abs(deviation(np.bincount((many >> shift & 255).ravel(), minlength=256), many.size / 256)) < 4


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permutation_is_a_bijection(n, seed):
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key(seed, "permute"))), np.arange(n))


@pytest.mark.parametrize("n", [2**31 - 1, 10**9 + 7, 10**15])
def test_permutation_of_a_large_range(n):
    index = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    result = permute(index, n, key(0, "permute"))
    assert result.min() >= 0 and result.max() < n
    assert len(np.unique(result)) == len(index)
    assert abs(deviation(np.bincount((result * (100 / n)).astype(int), minlength=100), len(index) / 100)) < 4


def test_each_key_has_its_own_permutation():
    keys = bits(key(0, "permute"), np.arange(20))
    index = np.arange(20)
    one_by_one = [permute(index[i : i + 1], 20, keys[i])[0] for i in range(20)]
    np.testing.assert_array_equal(permute(index, 20, keys), one_by_one)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_are_equally_likely(n):
    keys = bits(key(0, "permutations"), np.arange(20_000))
    drawn = np.stack([permute(np.full(len(keys), i), n, keys) for i in range(n)], axis=1)
    codes = {permutation: code for code, permutation in enumerate(itertools.permutations(range(n)))}
    counts = np.bincount([codes[tuple(row)] for row in drawn.tolist()], minlength=len(codes))
    assert abs(deviation(counts, len(keys) / len(codes))) < 4


@pytest.mark.parametrize("n", [64, 1000])
def test_all_pairs_of_images_are_equally_likely(n):
    keys = bits(key(0, "two elements"), np.arange(200_000))
    first, second = (permute(np.full(len(keys), i), n, keys) for i in (n // 3, n // 2))
    counts = np.delete(np.bincount(first * n + second, minlength=n * n), np.arange(n) * (n + 1))
    assert abs(deviation(counts, len(keys) / (n * (n - 1)))) < 4
