"""Codes of 4 bits in the words of a file -> words in the packed order, on the host: no product, and XLA is not asked.

Called through ctypes, which lets go of Python's lock while the library's threads share the columns.
"""

import ctypes

import numpy as np

from xla_ffi.cpu import library


class _NibbleWords(ctypes.Structure):
    """As in `product.h`."""

    _fields_ = [
        ("words", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")],
        ("nibbles", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("of_a_column", "blocks")],
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    ]


def missing() -> str | None:
    """Why it cannot run on this machine, or None."""
    return library.missing()


def pack_nibbles(
    words: np.ndarray, nibbles: np.ndarray, out: np.ndarray, instructions: str = "", *, threads: int = 1
) -> None:
    """Row `r*V + v` of the result has, at place k, nibble `nibbles[v, k] % 8` of word `nibbles[v, k] // 8` of column r.

    Args:
      words: uint32 `[W, R]`, of any strides.
      nibbles: int32 `[V, K]`, C-contiguous, 0 to `8*W - 1`; K whole blocks of 128.
      out: uint32 `[R*V, K/128, 16]` to fill; the words of a row are neighbours.
      instructions: one of `library.instructions()`; empty takes the first.
      threads: that share the work, the caller's among them.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    (rows, columns), (of_a_column, k) = words.shape, nibbles.shape
    assert out.shape == (columns * of_a_column, k // 128, 16) and k % 128 == 0, (words.shape, nibbles.shape, out.shape)
    assert words.dtype == out.dtype == np.uint32 and nibbles.dtype == np.int32 and nibbles.flags.c_contiguous
    assert out.strides[1:] == (64, 4) and nibbles.min() >= 0 and nibbles.max() < 8 * rows
    row_stride, column_stride, out_stride = (stride // 4 for stride in (*words.strides, out.strides[0]))
    given = _NibbleWords(
        words.ctypes.data, rows, columns, row_stride, column_stride, nibbles.ctypes.data, of_a_column, k // 128,
        out.ctypes.data, out_stride,
    )  # fmt: skip
    library.loaded().QjaxCpuPackNibbles(ctypes.byref(given), instructions.encode(), ctypes.c_int64(threads))
