"""Nibbles from anywhere in a column of words are those of the packed order, by every set of instructions."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.layouts import pack
from xla_ffi.cpu import library
from xla_ffi.cpu.pack_nibbles import pack_nibbles

if reason := library.missing():
    pytest.skip(reason, allow_module_level=True)

RNG = np.random.default_rng(0)
ROWS, BLOCKS = 50, 3


@pytest.mark.parametrize("instructions", library.instructions())
@pytest.mark.parametrize(("columns", "of_a_column"), [(32, 1), (75, 1), (5, 8)])
@pytest.mark.parametrize(("along", "threads"), [("rows", 1), ("columns", 1), ("rows", 3)])
def test_nibbles_from_anywhere_are_packed_in_order(
    instructions: str, columns: int, of_a_column: int, along: str, threads: int
) -> None:
    words = RNG.integers(0, 2**32, (ROWS, columns), np.uint32)
    nibbles = RNG.integers(0, 8 * ROWS, (of_a_column, BLOCKS * 128), np.int32)
    codes = words.T[:, nibbles // 8] >> (4 * (nibbles % 8)).astype(np.uint32) & 15  # column, row of it, k
    given = words if along == "rows" else np.ascontiguousarray(words.T).T
    out = np.zeros((columns * of_a_column, 2 * BLOCKS, 16), np.uint32)
    pack_nibbles(given, nibbles, out[:, BLOCKS:], instructions, threads=threads)
    expected = pack(jnp.asarray(codes.reshape(-1, BLOCKS * 128).astype(np.uint8)), 4)
    np.testing.assert_array_equal(out[:, BLOCKS:], expected)
    assert not out[:, :BLOCKS].any()
