"""Codes as other tools pack them -> bytes or our words. Bit order alone: no names, no scales.

A stream of b-bit codes is "LSB first": the words of a row laid end to end, code i in bits `i*b` to `i*b + b - 1`,
counted from the least significant. In a dense stream a code may straddle two words; in a padded one each word holds
`32 // b` whole codes and its top bits are unused.

Each class is a way to hold a matrix `[N, K]` of codes in a file. It reads what is asked for and no more: `columns`
gives any part as bytes with K first, and `nibbles` says where in words the codes are, where they are nibbles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from qjax.layouts import BLOCK

type Packing = Literal["dense", "padded"]

PACKINGS: tuple[Packing, ...] = ("dense", "padded")
WORD = 32
NIBBLES = 8  # of a word
_ROWS = 64  # rows that are packed into a stream at a time
_LINE = 64  # bytes of a line of the cache


# Words uint32 `[W, R]`, of any strides, and for code k of row `r*V + v` its nibble of column r, from the lowest of the
# first word on, int32 `[V, K']`.
type Nibbles = tuple[np.ndarray, np.ndarray]


class Codes(Protocol):
    """Unsigned codes `[N, K]` in a file."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and blocks that are best taken at a time."""

    def columns(self, rows: slice, ks: slice) -> np.ndarray:
        """Codes of some rows, uint8 `[K', N']`."""

    def nibbles(self, rows: slice, ks: slice) -> Nibbles | None:
        """Codes of some rows where they lie, or None where that is not in nibbles of words, or across such rows."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Streams along K: uint32 `[N, W]`, of any strides. `first` is the nibble of a byte that comes first."""

    words: np.ndarray
    bits: int
    length: int
    packing: Packing = "dense"
    first: Literal["low", "high"] = "low"

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return len(self.words), self.length

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and blocks that are best taken at a time."""
        return 512, 8

    def columns(self, rows: slice, ks: slice) -> np.ndarray:
        """Codes of some rows, uint8 `[K', N']`."""
        # Eight codes of a dense stream take `bits` bytes, and each lies in two neighbouring ones.
        count, size = (8, self.bits) if self.packing == "dense" else (WORD // self.bits, 4)
        first, last = ks.start // count, -(-ks.stop // count)
        stored = self._bytes(rows, first * size, last * size).reshape(last - first, size, -1)
        stored = np.ascontiguousarray(stored.swapaxes(0, 1))
        codes = np.empty((last - first, count, stored.shape[-1]), np.uint8)
        for place in range(count):
            byte, bit = divmod(place * self.bits, 8)
            code = stored[byte] >> np.uint8(bit)
            if bit + self.bits > 8:
                code |= stored[byte + 1] << np.uint8(8 - bit)
            code &= np.uint8(2**self.bits - 1)
            codes[:, place] = code
        return codes.reshape(-1, codes.shape[-1])[ks.start - first * count : ks.stop - first * count]

    def _bytes(self, rows: slice, start: int, stop: int) -> np.ndarray:
        """Bytes of the streams, `[stop - start, N']`; zeros after their end."""
        words = turned(self._ordered(self.words[rows, start // 4 : -(-stop // 4)]))
        found = np.empty((len(words), 4, words.shape[1]), np.uint8)
        for byte in range(4):
            found[:, byte] = (words >> np.uint32(8 * byte)).astype(np.uint8)
        flat = found.reshape(-1, words.shape[1])[start % 4 :][: stop - start]
        short = stop - start - len(flat)
        return np.pad(flat, [(0, short), (0, 0)]) if short else flat

    def _ordered(self, words: np.ndarray) -> np.ndarray:
        if self.first == "low":
            return words
        low = np.uint32(0x0F0F0F0F)
        return ((words & low) << np.uint32(4)) | ((words >> np.uint32(4)) & low)

    def nibbles(self, rows: slice, ks: slice) -> Nibbles | None:
        """Codes of some rows where they lie."""
        if self.bits != 4:
            return None
        places = np.arange(ks.start, ks.stop, dtype=np.int32)
        if self.first == "high":
            places ^= 1
        word = ks.start // NIBBLES
        return self.words[rows, word : -(-ks.stop // NIBBLES)].T, places[None] - np.int32(NIBBLES * word)


@dataclass(frozen=True, eq=False)
class NibblesAcross:
    """Eight neighbours along N in a word: uint32 `[K, N/8]`; neighbour j is nibble `order[j]`."""

    words: np.ndarray
    order: Sequence[int]

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.words.shape[1] * len(self.order), len(self.words)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and blocks that are best taken at a time."""
        return 1024, 8

    def columns(self, rows: slice, ks: slice) -> np.ndarray:
        """Codes of some rows, uint8 `[K', N']`."""
        each = len(self.order)
        first = rows.start // each
        words = self.words[ks, first : -(-rows.stop // each)]
        codes = np.empty((*words.shape, each), np.uint8)
        for place, nibble in enumerate(self.order):
            codes[..., place] = (words >> np.uint32(4 * nibble)) & np.uint32(15)
        return codes.reshape(len(words), -1)[:, rows.start - first * each : rows.stop - first * each]

    def nibbles(self, rows: slice, ks: slice) -> Nibbles | None:
        """Codes of some rows where they lie."""
        if rows.start % NIBBLES or rows.stop % NIBBLES:
            return None
        places = np.arange(0, NIBBLES * (ks.stop - ks.start), NIBBLES, dtype=np.int32)
        words = self.words[ks, rows.start // NIBBLES : rows.stop // NIBBLES]
        return words, places + np.array(self.order, np.int32)[:, None]


@dataclass(frozen=True, eq=False)
class Bytes:
    """A code a byte: uint8 `[N, K]`, to which `added` is added modulo 256."""

    codes: np.ndarray
    added: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        n, k = self.codes.shape
        return n, k

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and blocks that are best taken at a time."""
        return 256, 8

    def columns(self, rows: slice, ks: slice) -> np.ndarray:
        """Codes of some rows, uint8 `[K', N']`."""
        codes = turned(self.codes[rows, ks])
        return codes + np.uint8(self.added) if self.added else codes

    def nibbles(self, rows: slice, ks: slice) -> Nibbles | None:
        """There are none."""
        return None


@dataclass(frozen=True, eq=False)
class Ordered:
    """Other codes, place k holding code `order[k]`."""

    codes: Codes
    order: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and blocks that are best taken at a time."""
        return 256, -(-self.shape[1] // BLOCK)

    def columns(self, rows: slice, ks: slice) -> np.ndarray:
        """Codes of some rows, uint8 `[K', N']`."""
        return self.codes.columns(rows, slice(0, self.shape[1]))[self.order[ks]]

    def nibbles(self, rows: slice, ks: slice) -> Nibbles | None:
        """Codes of some rows where they lie."""
        found = self.codes.nibbles(rows, slice(0, self.shape[1]))
        return None if found is None else (found[0], np.take(found[1], self.order[ks], axis=1))


def turned(array: np.ndarray) -> np.ndarray:
    """The transpose of a small matrix, copied by way of rows that are a line longer, unless it lies so already."""
    if array.strides[0] <= array.strides[1]:
        return np.ascontiguousarray(array.T)
    buffer = np.empty((len(array), array.shape[1] + _LINE // array.itemsize), array.dtype)[:, : array.shape[1]]
    buffer[...] = array
    return np.ascontiguousarray(buffer.T)


def every(codes: Codes) -> np.ndarray:
    """All of them, uint8 `[K, N]`: for zero points, which are few."""
    n, k = codes.shape
    return codes.columns(slice(0, n), slice(0, k))


def word_count(length: int, bits: int, packing: Packing = "dense") -> int:
    """Words that `length` codes take."""
    return -(-length * bits // WORD) if packing == "dense" else -(-length // (WORD // bits))


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes `[R, L]` -> a dense LSB-first stream in each row, uint32 `[R, ceil(L * bits / 32)]`."""
    found = np.zeros((len(codes), word_count(codes.shape[1], bits)), "<u4")
    for start in range(0, len(codes), _ROWS):
        ones = np.unpackbits(codes[start : start + _ROWS, :, None].astype(np.uint8), axis=2, bitorder="little")
        stream = np.packbits(ones[:, :, :bits].reshape(len(ones), -1), axis=1, bitorder="little")
        found[start : start + _ROWS].view(np.uint8)[:, : stream.shape[1]] = stream
    return found


def as_words(rows: np.ndarray) -> np.ndarray:
    """Bytes `[R, B]` of any dtype -> little-endian words `[R, ceil(B/4)]`, zeros at the end."""
    rows = np.ascontiguousarray(rows).view(np.uint8)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[-1] % 4)]) if rows.shape[-1] % 4 else rows
    return rows.view("<u4")
