"""Words that NumPy packs are those that `qjax.layouts` packs."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import host_layouts
from qjax.layouts import PLANES, pack

K, ROWS = 384, 24


def random_codes(bits: int) -> np.ndarray:
    """uint8 `[K, ROWS]`."""
    return np.random.default_rng(bits).integers(0, 2**bits, (K, ROWS)).astype(np.uint8)


def expected(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(pack(jnp.asarray(codes.T), bits))


def eight_a_word(codes: np.ndarray) -> np.ndarray:
    """Codes `[8 n, ...]` -> words `[n, ...]`, the first code lowest."""
    words = codes.reshape(-1, 8, *codes.shape[1:]).astype(np.uint32)
    return np.bitwise_or.reduce(words << np.arange(0, 32, 4, dtype=np.uint32)[:, None], axis=1)


@pytest.mark.parametrize("bits", PLANES)
def test_codes_of_every_width_are_packed_in_the_order_of_layouts(bits: int) -> None:
    codes = random_codes(bits)
    out = np.zeros((ROWS, 2 * K // 128, 4 * bits), np.uint32)
    host_layouts.pack_codes(codes, bits, out[:, 1::2][:, : K // 128])
    np.testing.assert_array_equal(out[:, 1::2], expected(codes, bits))
    assert not out[:, ::2].any()


def test_nibbles_along_k_are_repacked_without_being_taken_out() -> None:
    codes = random_codes(4)
    words = eight_a_word(codes)
    for pack_words, given in (
        (host_layouts.pack_nibble_columns, words),
        (host_layouts.pack_nibble_rows, np.ascontiguousarray(words.T)),
    ):
        out = np.zeros((ROWS, K // 128, 16), np.uint32)
        pack_words(given, out)
        np.testing.assert_array_equal(out, expected(codes, 4))


def test_nibbles_across_n_are_repacked_without_being_taken_out() -> None:
    codes = random_codes(4)
    out = np.zeros((ROWS, K // 128, 16), np.uint32)
    host_layouts.pack_nibbles_across(eight_a_word(codes.T).T, [out[place::8] for place in range(8)])
    np.testing.assert_array_equal(out, expected(codes, 4))
