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


@pytest.mark.parametrize("bits", PLANES)
def test_codes_of_every_width_are_packed_in_the_order_of_layouts(bits: int) -> None:
    codes = random_codes(bits)
    out = np.zeros((ROWS, 2 * K // 128, 4 * bits), np.uint32)
    host_layouts.pack_codes(codes, bits, out[:, 1::2][:, : K // 128])
    np.testing.assert_array_equal(out[:, 1::2], expected(codes, bits))
    assert not out[:, ::2].any()
