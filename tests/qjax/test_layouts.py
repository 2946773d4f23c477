"""The packed order, against the formula that states it, element by element."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.layouts import BLOCK, PLANES, pack, padded, unpack

WIDTHS = tuple(PLANES)


def random_codes(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


def place(k: int, bits: int) -> tuple[int, int]:
    """The word and the lowest bit of code k of a block in a plane of `bits` bits."""
    # k = 32 j + 16 s + 8 h + 2 c + l, digit by digit
    j, s, h, c, low = k // 32, k // 16 % 2, k // 8 % 2, k // 2 % 4, k % 2
    t = 4 * j + 2 * s + h
    return bits * c + t // (16 // bits), 16 * low + bits * (t % (16 // bits))


def words_by_hand(codes: np.ndarray, bits: int) -> list[int]:
    """One block, code by code; planes of a width that is no power of two, the wide one first."""
    words: list[int] = []
    low = 0
    for width in {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}[bits]:
        plane = [0] * (4 * width)
        for k, code in enumerate(codes):
            word, bit = place(k, width)
            plane[word] |= (int(code) >> low) % 2**width << bit
        words += plane
        low += width
    return words


class PackTest(parameterized.TestCase):
    @parameterized.parameters(*WIDTHS)
    def test_every_code_lies_where_the_formula_puts_it(self, bits):
        codes = random_codes(bits, 3, 2 * BLOCK)
        packed = np.asarray(pack(jnp.asarray(codes), bits))
        by_hand = [[words_by_hand(row[b : b + BLOCK], bits) for b in (0, BLOCK)] for row in codes]
        assert packed.shape == (3, 2, 4 * bits) and packed.dtype == np.uint32
        np.testing.assert_array_equal(packed, np.array(by_hand, np.uint32))

    def test_four_bits_follow_the_nibble_formula(self):
        codes = random_codes(4, BLOCK)
        packed = np.asarray(pack(jnp.asarray(codes), 4))[0]
        for c, j, s, h, l in itertools.product(*map(range, (4, 4, 2, 2, 2))):  # noqa: E741
            nibble = packed[4 * c + j] >> np.uint32(4 * (4 * l + 2 * s + h)) & np.uint32(15)
            assert nibble == codes[32 * j + 16 * s + 8 * h + 2 * c + l]

    def test_one_mask_takes_the_pair_of_a_tensor_core_lane(self):
        # In mma.m16n8k16 the thread of column c holds k = 2c, 2c + 1 and 2c + 8, 2c + 9 of each step of 16.
        codes = random_codes(4, BLOCK)
        packed = np.asarray(pack(jnp.asarray(codes), 4))[0]
        for step, h, c in itertools.product(range(8), range(2), range(4)):
            j, s = divmod(step, 2)
            pair = packed[4 * c + j] >> np.uint32(4 * (2 * s + h)) & np.uint32(0x000F000F)
            k = 16 * step + 2 * c + 8 * h
            assert (pair & 0xFFFF, pair >> 16) == (codes[k], codes[k + 1])

    @parameterized.parameters(*WIDTHS)
    def test_every_bit_of_a_block_is_used_once(self, bits):
        ones = np.full((1, BLOCK), 2**bits - 1, np.uint8)
        assert np.all(np.asarray(pack(jnp.asarray(ones), bits)) == 0xFFFFFFFF)
        one_at_a_time = np.asarray(pack(jnp.eye(BLOCK, dtype=jnp.uint8), bits))
        assert np.bitwise_count(one_at_a_time).sum() == BLOCK
        assert np.bitwise_count(np.bitwise_or.reduce(one_at_a_time, 0)).sum() == BLOCK

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(WIDTHS), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
    def test_unpacking_is_the_inverse(self, bits, blocks, rows, seed):
        codes = random_codes(bits, 2, rows, blocks * BLOCK, seed=seed)
        packed = jax.jit(pack, static_argnums=1)(codes, bits)
        again = jax.jit(unpack, static_argnums=1)(packed, bits)
        assert packed.shape == (2, rows, blocks, 4 * bits) and again.dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(again), codes)

    @parameterized.parameters(*WIDTHS)
    def test_packing_is_the_inverse_of_unpacking(self, bits):
        words = np.random.default_rng(bits).integers(0, 2**32, (5, 3, 4 * bits), dtype=np.uint32)
        np.testing.assert_array_equal(np.asarray(pack(unpack(words, bits), bits)), words)

    @parameterized.parameters(*WIDTHS)
    def test_a_code_takes_its_bits_and_no_more(self, bits):
        assert pack(jnp.zeros((7, 3 * BLOCK), jnp.uint8), bits).nbytes == 7 * 3 * BLOCK * bits // 8

    @parameterized.parameters((1, 128), (128, 128), (129, 256), (7392, 7424))
    def test_rows_are_padded_to_whole_blocks(self, k, stored):
        assert padded(k) == stored


class CutTest(parameterized.TestCase):
    """Slicing, joining and sharding commute with packing, on both axes."""

    @parameterized.parameters(*WIDTHS)
    def test_slicing_rows_and_blocks_commutes_with_packing(self, bits):
        codes = jnp.asarray(random_codes(bits, 6, 4 * BLOCK))
        packed = pack(codes, bits)
        np.testing.assert_array_equal(packed[2:5], pack(codes[2:5], bits))
        np.testing.assert_array_equal(packed[:, 1:3], pack(codes[:, BLOCK : 3 * BLOCK], bits))

    @parameterized.parameters(*WIDTHS)
    def test_joining_rows_and_blocks_commutes_with_packing(self, bits):
        a = jnp.asarray(random_codes(bits, 3, 2 * BLOCK, seed=1))
        b = jnp.asarray(random_codes(bits, 3, 2 * BLOCK, seed=2))
        for axis in (0, 1):
            joined = jnp.concatenate([pack(a, bits), pack(b, bits)], axis=axis)
            np.testing.assert_array_equal(joined, pack(jnp.concatenate([a, b], axis=axis), bits))
