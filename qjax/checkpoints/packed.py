"""`QTensor.packed` of a file's codes, not there yet: any rows and blocks of it are made when they are asked for."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints.buffers import THREADS, empty, in_parallel
from qjax.checkpoints.codes import Codes
from qjax.dispatch.choose import load_if_present
from qjax.dispatch.routes import CPU, Route
from qjax.host_layouts import pack_codes
from qjax.layouts import BLOCK, padded
from qjax.qtensor import QTensor, k_pieces
from qjax.schemes import Scheme

_NIBBLES = Route("cpu.pack_nibbles", "cpu", "xla_ffi.cpu.pack_nibbles", platforms=CPU)


def storage_bits(bits: int) -> int:
    """Bits of the format that holds codes of `bits`: 7 are held in 8."""
    return 8 if bits == 7 else bits


def to_zero_point(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes -> int8 in the domain of stored ones: as they are below 7 bits, else minus `2^(bits-1)`."""
    middle = 2 ** (bits - 1) if bits >= 7 else 0
    return (codes - np.uint8(middle)).view(np.int8)


@dataclass(frozen=True, eq=False)
class Packed:
    """Words uint32 `[N, blocks, 4 * bits]`, or int8 `[N, K]` of 7 and 8 bits.

    Attributes:
      codes: unsigned.
      bits: of a code in the file.
      pieces: equal parts of K, each padded to whole blocks on its own.
    """

    codes: Codes
    bits: int
    pieces: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole, padding too."""
        n, k = self.codes.shape
        return (n, k) if self.bits >= 7 else (n, self.pieces * self._piece_blocks, 4 * self.bits)

    @property
    def dtype(self) -> np.dtype:
        """uint32 or int8."""
        return np.dtype(np.int8 if self.bits >= 7 else np.uint32)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def _piece(self) -> int:
        return self.codes.shape[1] // self.pieces

    @property
    def _piece_blocks(self) -> int:
        return padded(self._piece) // BLOCK

    def cut(self, pieces: int) -> "Packed":
        """The same in another number of pieces."""
        return dataclasses.replace(self, pieces=pieces)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        n, columns = (range(size)[part] for size, part in zip(self.shape[:2], index[:2], strict=True))
        found = empty((len(n), len(columns), *self.shape[2:]), self.dtype)
        if self.bits >= 7:
            self._in_rows(n, lambda rows: self._fill_bytes(rows, columns, found[rows.start - n.start :]))
            return found
        block = columns.start
        while block < columns.stop:
            piece, within = divmod(block, self._piece_blocks)
            count = min(columns.stop - block, self._piece_blocks - within)
            start = piece * self._piece + within * BLOCK
            ks = slice(start, min(start + count * BLOCK, (piece + 1) * self._piece))
            self._fill_words(n, ks, found[:, block - columns.start :][:, :count])
            block += count
        return found

    def _in_rows(self, n: range, work: Callable[[slice], None]) -> None:
        """Calls `work` on rows that are best taken at a time, on several threads."""
        height = self.codes.tile[0]
        in_parallel(work, [slice(start, min(start + height, n.stop)) for start in range(n.start, n.stop, height)])

    def _fill_bytes(self, rows: slice, columns: range, out: np.ndarray) -> None:
        width = self.codes.tile[1] * BLOCK
        for start in range(columns.start, columns.stop, width):
            codes = self.codes.columns(rows, slice(start, min(start + width, columns.stop)))
            out[: codes.shape[1], start - columns.start :][:, : len(codes)] = to_zero_point(codes, self.bits).T

    def _fill_words(self, n: range, ks: slice, out: np.ndarray) -> None:
        """Fills the blocks of a piece: whole ones of nibbles from word to word, the rest as bytes, by tiles."""
        done = self._fill_nibbles(slice(n.start, n.stop), ks, out)
        blocks = self.codes.tile[1]

        def fill(rows: slice) -> None:
            for first in range(done, out.shape[1], blocks):
                some = out[rows.start - n.start : rows.stop - n.start, first : first + blocks]
                begin = ks.start + first * BLOCK
                self._fill_tile(rows, slice(begin, min(begin + some.shape[1] * BLOCK, ks.stop)), some)

        if done < out.shape[1]:
            self._in_rows(n, fill)

    def _fill_nibbles(self, rows: slice, ks: slice, out: np.ndarray) -> int:
        """Fills whole blocks and says how many: none where there are no nibbles in words, or no library."""
        whole, pack_nibbles = (ks.stop - ks.start) // BLOCK, _pack_nibbles()
        found = self.codes.nibbles(rows, slice(ks.start, ks.start + whole * BLOCK)) if whole and pack_nibbles else None
        if found is None or pack_nibbles is None:
            return 0
        pack_nibbles(*found, out[:, :whole], threads=THREADS)
        return whole

    def _fill_tile(self, rows: slice, ks: slice, out: np.ndarray) -> None:
        """Fills blocks, zeros at the end."""
        codes = self.codes.columns(rows, ks)
        short = out.shape[1] * BLOCK - len(codes)
        pack_codes(np.pad(codes, [(0, short), (0, 0)]) if short else codes, self.bits, out)


@functools.cache
def _pack_nibbles() -> Callable[..., None] | None:
    """The one of the library for CPUs, which the host has even where the weight goes to a GPU; None without it."""
    module = load_if_present(_NIBBLES)
    return None if module is None or module.missing() else module.pack_nibbles


def host_tensor(packed: Any, scale: Any, zero_point: Any = None, *, scheme: Scheme, k: int, **arrays: Any) -> QTensor:
    """A QTensor on its way to a device: `packed` is a `Packed` or of NumPy, `scale` a QTensor or of NumPy, as all else.

    Args:
      packed: the codes.
      scale: of blocks.
      zero_point: like `scale`.
      scheme: what the arrays mean.
      k: length of K.
      **arrays: other fields of a QTensor.
    """
    return QTensor(packed, scale, zero_point, scheme=scheme, k_piece=k_pieces(k, scheme.bits, 1), **arrays)
