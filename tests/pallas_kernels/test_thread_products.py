"""Products within a thread: digits are near what they stand for, sums of codes are exact, bytes are turned right."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton import thread_products

ROWS, D, THREADS = 4, 32, 8


def codes(seed: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (ROWS, D), -127, 128).astype(jnp.int8)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e20])
def test_digits_are_within_half_a_step(size):
    a = size * jax.random.normal(jax.random.key(0), (D,))
    high, low, scale = thread_products.digits(a)
    assert (high.dtype, low.dtype) == (jnp.int8, jnp.uint8)
    found = (256.0 * np.asarray(high, np.float64) + np.asarray(low, np.float64)) * float(scale)
    assert np.abs(found - np.asarray(a, np.float64)).max() <= 0.5001 * float(scale)
    assert float(scale) <= max(float(jnp.abs(a).max()), 1e-30) / 32512 * 1.001


def test_a_dot_of_codes_is_the_integers():
    keys, (high, low, _) = codes(1), thread_products.digits(jax.random.normal(jax.random.key(2), (D,)))
    found = thread_products.dot_of_codes(keys, high, low, THREADS, interpret=True)
    whole = 256 * np.asarray(high, np.int64) + np.asarray(low, np.int64)
    np.testing.assert_allclose(found, np.asarray(keys, np.int64) @ whole, rtol=1e-7)


def test_four_rows_of_codes_are_weighed_to_sixteen_bits():
    four = [codes(seed) for seed in range(4)]
    scales = [jax.random.uniform(jax.random.key(seed), (ROWS,)) for seed in range(4)]
    total = jax.random.normal(jax.random.key(9), (ROWS, D))
    found = thread_products.add_scaled_codes(total, four, scales, interpret=True)
    exact = np.asarray(total, np.float64)
    exact = exact + sum(np.asarray(c, np.float64) * np.asarray(s)[:, None] for c, s in zip(four, scales, strict=True))
    assert np.abs(np.asarray(found) - exact).max() <= 4 * 127 * 0.51 / 65535 * max(map(jnp.max, scales)) + 1e-4
    nothing = [jnp.zeros(ROWS)] * 4
    chex.assert_trees_all_equal(thread_products.add_scaled_codes(total, four, nothing, interpret=True), total)


def test_words_of_four_numbers_become_words_of_four_rows():
    """The PTX's `prmt`, done by hand: byte i of the result is the byte of both words that nibble i of `how` names."""
    known = {f"${4 + row}": [(row, number) for number in range(4)] for row in range(4)}
    for to, x, y, how in re.findall(r"prmt\.b32 (\w+), (\$?\w+), (\$?\w+), 0x(\w{4});", thread_products._TURNED):
        both = known[x] + known[y]
        known[to] = [both[int(nibble)] for nibble in reversed(how)]
    assert [known[to] for to in "efgh"] == [[(row, number) for row in range(4)] for number in range(4)]
