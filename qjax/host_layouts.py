"""The packed order of `qjax.layouts` in NumPy: codes of a file -> words, without a device and a cacheful at a time.

Arrays that are transposed have rows a little longer than they need: rows that begin a power of two apart share a few
lines of the cache.
"""

import math
import threading

import numpy as np

from qjax.layouts import BLOCK, PLANES

_LINE = 16  # words of a cache line


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
