"""The packed order of `qjax.layouts` in NumPy: codes of a file -> words, without a device and a cacheful at a time.

Where codes are nibbles in words already, none is taken out: a word holds 8 of them at places of three bits, the words
of a block are numbered by more bits, and packing swaps bits of the one number for bits of the other (`_swap`), which
takes six operations on two arrays of words. Arrays that are transposed have rows a little longer than they need: rows
that begin a power of two apart share a few lines of the cache.
"""

import math
import threading

import numpy as np

from qjax.layouts import BLOCK, PLANES

NIBBLES = 8  # in a word
_LINE = 16  # words of a cache line

# Bit of a nibble's place in its word -> how far apart the two places are, and which bits have a 0 there.
_APART = (
    (np.array(4, np.uint32), np.array(0x0F0F0F0F, np.uint32)),
    (np.array(8, np.uint32), np.array(0x00FF00FF, np.uint32)),
    (np.array(16, np.uint32), np.array(0x0000FFFF, np.uint32)),
)


class _Scratch(threading.local):
    """Memory that a thread works in and keeps: what is new has to be cleared by the system, page by page."""

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """An array for one `use` at a time, its values undefined."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.kept.get(use, np.empty(0)).nbytes < size:
            self.kept[use] = np.empty(size, np.uint8)
        return self.kept[use][:size].view(dtype).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A C-contiguous copy."""
        found = self.array("moved", array.shape, array.dtype.type)
        found[...] = array
        return found


_SCRATCH = _Scratch()


def pack_codes(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Packs unsigned codes of any width.

    Args:
      codes: uint8 `[K, R]`, below `2^bits`, K whole blocks.
      bits: 1 to 6.
      out: uint32 `[R, K/128, 4 * bits]` to fill; the words of a block are neighbours.
    """
    k, rows = codes.shape
    assert k % BLOCK == 0 and out.shape == (rows, k // BLOCK, 4 * bits), (codes.shape, out.shape, bits)
    packed = _SCRATCH.array("turned", (k // BLOCK, 4 * bits, 4, rows + _LINE), np.uint8)  # word, byte
    word = low = 0
    for width in PLANES[bits]:
        each = 8 // width  # codes of a byte
        digits = codes.reshape(-1, width, 2, each, 4, 2, rows)  # t_high, half of a word's half, t_low, c, l
        ordered = _SCRATCH.copy(digits.transpose(3, 0, 4, 1, 5, 2, 6)).reshape(each, -1)
        merged = _merged(ordered.view(np.uint64), low, width, bits).view(np.uint8)
        packed[:, word : word + 4 * width, :, :rows] = merged.reshape(-1, 4 * width, 4, rows)
        word, low = word + 4 * width, low + width
    bytes_out = out.view(np.uint8)
    bytes_out[...] = packed.reshape(-1, 16 * bits, rows + _LINE)[:, :, :rows].transpose(2, 0, 1)


def _merged(codes: np.ndarray, low: int, width: int, bits: int) -> np.ndarray:
    """Bits from `low` of codes a byte, `[8 / width, ...]`, eight of them at once -> bytes of so many codes."""
    if width < bits:
        np.right_shift(codes, np.uint64(low), out=codes)
        np.bitwise_and(codes, np.uint64((2**width - 1) * 0x0101010101010101), out=codes)
    for place, more in enumerate(codes[1:], 1):
        np.left_shift(more, np.uint64(place * width), out=more)
        np.bitwise_or(codes[0], more, out=codes[0])
    return np.asarray(codes[0])


def pack_nibble_columns(words: np.ndarray, out: np.ndarray) -> None:
    """Repacks 4-bit codes that lie along K in words, the first one lowest; K comes first.

    Args:
      words: uint32 `[K/8, R]`, K whole blocks.
      out: uint32 `[R, K/128, 16]` to fill.
    """
    count, rows = words.shape
    blocks = words.reshape(count // 16, 4, 2, 2, rows)  # j, s, h; a nibble's place is 4*c1 + 2*c0 + l
    moved = _SCRATCH.copy(blocks.transpose(3, 2, 0, 1, 4))
    _along_k(moved)
    turned = _SCRATCH.array("turned", (count // 16, 2, 2, 4, rows + _LINE), np.uint32)  # c1, c0, j
    turned[..., :rows] = moved.transpose(2, 0, 1, 3, 4)
    out[...] = turned.reshape(-1, 16, rows + _LINE)[:, :, :rows].transpose(2, 0, 1)


def pack_nibble_rows(words: np.ndarray, out: np.ndarray) -> None:
    """As `pack_nibble_columns`, of words `[R, K/8]`."""
    rows, count = words.shape
    blocks = words.reshape(rows, count // 16, 4, 2, 2)  # j, s, h
    moved = _SCRATCH.copy(blocks.transpose(4, 3, 0, 1, 2))
    _along_k(moved)
    four = np.dtype((np.void, 16))  # the words of all j
    out.view(four)[...] = moved.reshape(4, rows, -1).view(four).reshape(4, rows, -1).transpose(1, 2, 0)


def _along_k(moved: np.ndarray) -> None:
    """Words `[h, s, ...]` whose nibbles are at places 4*c1 + 2*c0 + l -> `[c1, c0, ...]`, in place."""
    scratch = _SCRATCH.array("swapped", moved.shape[1:], np.uint32)
    _swap(moved[0], moved[1], 0, scratch)  # h for l
    for middle in moved:
        _swap(middle[0], middle[1], 1, scratch[0])  # s for c0
    _swap(moved[0], moved[1], 2, scratch)  # l for c1


def pack_nibbles_across(words: np.ndarray, out: list[np.ndarray]) -> None:
    """Repacks 4-bit codes that lie along N in words.

    Args:
      words: uint32 `[K, C]`, K whole blocks.
      out: uint32 `[C, K/128, 16]` for each nibble of a word from the lowest, to fill.
    """
    k, columns = words.shape
    digits = words.reshape(k // BLOCK, 4, 2, 2, 4, 2, columns)  # j, s, h, c, l
    moved = _SCRATCH.array("turned", (2, 2, 2, k // BLOCK, 4, 4, columns + _LINE), np.uint32)
    moved[..., :columns] = digits.transpose(5, 2, 3, 0, 4, 1, 6)
    scratch = _SCRATCH.array("swapped", moved.shape[1:], np.uint32)
    _swap(moved[0], moved[1], 2, scratch)  # l
    for half in moved:
        _swap(half[0], half[1], 1, scratch[0])  # s
        for quarter in half:
            _swap(quarter[0], quarter[1], 0, scratch[0, 0])  # h
    for nibble, rows in enumerate(moved.reshape(NIBBLES, -1, 16, columns + _LINE)):
        out[nibble][...] = rows[:, :, :columns].transpose(2, 0, 1)


def _swap(zero: np.ndarray, one: np.ndarray, bit: int, scratch: np.ndarray) -> None:
    """Swaps the bit that tells the two arrays apart for a bit of the nibbles' places, in place."""
    apart, low = _APART[bit]
    np.right_shift(zero, apart, out=scratch)
    np.bitwise_xor(scratch, one, out=scratch)
    np.bitwise_and(scratch, low, out=scratch)
    np.bitwise_xor(one, scratch, out=one)
    np.left_shift(scratch, apart, out=scratch)
    np.bitwise_xor(zero, scratch, out=zero)
