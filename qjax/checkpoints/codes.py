"""Codes as other tools pack them -> codes -> our words. Bit order alone: no names, no scales.

A stream of b-bit codes is "LSB first": the words of a row laid end to end, code i in bits `i*b` to `i*b + b - 1`,
counted from the least significant. In a dense stream a code may straddle two words; in a padded one each word holds
`32 // b` whole codes and its top bits are unused. Words are turned into words by one program on the device.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax.layouts import pack, padded

type Packing = Literal["dense", "padded"]

PACKINGS: tuple[Packing, ...] = ("dense", "padded")
WORD = 32
_ROWS = 64  # rows that are transposed at a time
_LINE = 16  # words of a cache line
_ALIGNMENT = 64
_THREADS = 8


def storage_bits(bits: int) -> int:
    """Bits of the format that holds codes of `bits`: 7 are held in 8."""
    return 8 if bits == 7 else bits


def word_count(length: int, bits: int, packing: Packing = "dense") -> int:
    """Words that `length` codes take."""
    return -(-length * bits // WORD) if packing == "dense" else -(-length // (WORD // bits))


def transposed(words: np.ndarray) -> jax.Array:
    """Words `[R, C]` of a file -> uint32 `[C, R]` on the default device.

    A GPU does it itself. A CPU would go through rows that begin a power of two apart, which share a few lines of its
    cache; a few rows at a time, from a buffer with longer ones, it is ten times faster.
    """
    words = words.view(np.uint32)
    if jax.default_backend() != "cpu":
        return jnp.asarray(words).T
    rows, columns = words.shape
    found = _aligned((columns, rows), words.dtype)

    def turn(start: int) -> None:
        chunk = words[start : start + _ROWS]
        buffer = np.empty((len(chunk), columns + _LINE), words.dtype)[:, :columns]
        buffer[:] = chunk
        found[:, start : start + _ROWS] = buffer.T

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(turn, range(0, rows, _ROWS)))
    return jnp.asarray(found)


def _aligned(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can use on a CPU as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


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


@partial(jax.jit, static_argnames=("bits", "count", "packing"))
def unpack_stream(words: jax.Array, bits: int, count: int, packing: Packing = "dense") -> jax.Array:
    """The first `count` codes of LSB-first streams: uint32 `[R, W]` -> uint8 `[R, count]`."""
    if packing == "padded" or WORD % bits == 0:
        shifts = bits * jnp.arange(WORD // bits, dtype=jnp.uint32)
        codes = (words[:, :, None] >> shifts) & jnp.uint32(2**bits - 1)
        return codes.astype(jnp.uint8).reshape(words.shape[0], -1)[:, :count]
    # Eight codes take `bits` bytes, and each lies in two neighbouring ones.
    each = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(words.shape[0], -1)
    each = jnp.pad(each, [(0, 0), (0, -each.shape[1] % bits)])
    run = each.reshape(words.shape[0], -1, bits).astype(jnp.uint16)
    columns = []
    for code in range(8):
        byte, bit = divmod(code * bits, 8)
        pair = run[..., byte] | (run[..., min(byte + 1, bits - 1)] << 8)
        columns.append(((pair >> bit) & jnp.uint16(2**bits - 1)).astype(jnp.uint8))
    return jnp.stack(columns, axis=-1).reshape(words.shape[0], -1)[:, :count]


@partial(jax.jit, static_argnames="order")
def unpack_rows(words: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """uint32 `[R, C]` -> uint8 `[8 R, C]`: row `8 r + j` is nibble `order[j]` of the words of row r."""
    shifts = 4 * jnp.array(order, jnp.uint32)
    codes = (words[:, None, :] >> shifts[:, None]) & jnp.uint32(15)
    return codes.astype(jnp.uint8).reshape(-1, words.shape[1])


@partial(jax.jit, static_argnames=("bits", "k", "packing"))
def repack_stream(
    words: jax.Array, bits: int, k: int, packing: Packing = "dense", order: jax.Array | None = None
) -> jax.Array:
    """LSB-first streams along K, uint32 `[N, W]` -> `QTensor.packed`; `order` as in `to_storage`."""
    codes = unpack_stream(words, bits, k, packing)
    if WORD % bits or order is not None:
        codes = jax.lax.optimization_barrier(codes)  # else unpacked again for each bit that is packed
    return to_storage(codes, bits, order)


@partial(jax.jit, static_argnames="k")
def repack_swapped(words: jax.Array, k: int) -> jax.Array:
    """Bytes of two 4-bit codes along K, high nibble first, as words `[N, W]` -> `QTensor.packed`."""
    low = jnp.uint32(0x0F0F0F0F)
    return repack_stream(((words & low) << 4) | ((words >> 4) & low), 4, k)


@partial(jax.jit, static_argnames=("nibbles", "bits"))
def repack_rows(words: jax.Array, nibbles: tuple[int, ...], bits: int) -> jax.Array:
    """Words as `unpack_rows` takes them -> `QTensor.packed`."""
    return to_storage(unpack_rows(words, nibbles), bits)


@partial(jax.jit, static_argnames="bits")
def to_storage(codes: jax.Array, bits: int, order: jax.Array | None = None) -> jax.Array:
    """Unsigned codes uint8 `[N, K]` of an integer format -> `QTensor.packed`: words, or int8 at 7 and 8 bits.

    `order`, int32 `[K]`, says which code comes to each place.
    """
    if order is not None:
        codes = codes[:, order]
    return to_zero_point(codes, bits) if bits >= 7 else to_words(codes, bits)


@partial(jax.jit, static_argnames="bits")
def to_words(codes: jax.Array, bits: int) -> jax.Array:
    """Codes uint8 `[..., N, K]` -> words `[..., N, ceil(K/128), 4 * bits]`."""
    k = codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padded(k) - k)])
    return pack(codes, bits)


@partial(jax.jit, static_argnames="bits")
def to_zero_point(codes: jax.Array, bits: int) -> jax.Array:
    """Unsigned codes -> int8 in the domain of stored ones: as they are below 7 bits, else minus `2^(bits-1)`."""
    middle = 2 ** (bits - 1) if bits >= 7 else 0
    return (codes.astype(jnp.int16) - middle).astype(jnp.int8)
