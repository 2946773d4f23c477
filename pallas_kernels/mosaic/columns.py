"""Scales and zero points: columns of `[N, groups]`, brought by the producer into shared memory, ready for use.

A row's entries are no multiple of 16 bytes in general, so that the copy engine cannot fetch a tile of them. The
warpgroup that feeds it has 128 idle lanes: each loads the entries of its rows, turns them into 32 bits, float32 or a
pair of 16-bit floats, and stores them by group, where the warps that multiply read them with no conflict and nothing
left to convert.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from pallas_kernels.pairs import both

LANES = 128
_MOST = 4  # words that a lane loads at once


def as_loaded(a: jax.Array) -> jax.Array:
    """Floats of 8 bits, which a lane does not load as such, as bytes."""
    return jax.lax.bitcast_convert_type(a, jnp.uint8) if a.dtype.itemsize == 1 and a.dtype != jnp.int8 else a


def value(raw: jax.Array, dtype: str) -> jax.Array:
    """What was loaded of an array of `as_loaded`, in float32."""
    if raw.dtype != jnp.uint8:
        return raw.astype(jnp.float32)
    byte = raw.astype(jnp.uint32)
    if dtype == "float8_e8m0fnu":
        bits = jnp.where(byte == 0, jnp.uint32(1 << 22), byte << 23)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    assert dtype == "float8_e4m3fn", dtype
    bits = ((byte >> 7) << 31) | ((byte & 127) << 20)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) * np.float32(2.0**120)


def as_words(a: jax.Array) -> jax.Array:
    """Rows of whole words as such, uint32, each with one entry or several; others by `as_loaded`."""
    (rows, count), size = a.shape, a.dtype.itemsize
    if count * size % 4:
        return as_loaded(a)
    return jax.lax.bitcast_convert_type(a if size == 4 else a.reshape(rows, -1, 4 // size), jnp.uint32)


def entry(word: jax.Array, at: jax.Array | int, dtype: str) -> jax.Array:
    """The entry of `dtype` at a place in a word of `as_words`, in float32."""
    size = jnp.dtype(dtype).itemsize
    if size == 4:
        return jax.lax.bitcast_convert_type(word, jnp.float32)
    bits = word >> (jnp.uint32(8 * size) * jnp.asarray(at).astype(jnp.uint32))
    if dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    if dtype == "int8":
        return (jax.lax.bitcast_convert_type(bits << 24, jnp.int32) >> 24).astype(jnp.float32)
    if dtype == "float16":
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    return value(bits.astype(jnp.uint8), dtype)


def _pair_in_lanes(values: Any, dtype: str) -> Any:
    """`pair` on a lane's registers."""
    i32, found = ir.IntegerType.get_signless(32), []
    for register in values.registers.flat:
        word = mgpu.utils.inline_ptx(both(dtype), vector.extract(register, [], [0]), result_types=i32)
        found.append(vector.broadcast(ir.VectorType.get((1,), i32), word))
    return mgpu.FragmentedArray(_registers=np.array(found, dtype=object), _layout=values.layout, _is_signed=False)


def pair(values: jax.Array, dtype: str, interpret: bool) -> jax.Array:
    """float32 `[H]` of `read` -> uint32 `[H]`: each in `dtype`, "bfloat16" or "float16", in both halves."""
    if interpret:
        half = jax.lax.bitcast_convert_type(values.astype(dtype), jnp.uint16)
        return half.astype(jnp.uint32) * jnp.uint32(0x10001)
    layout = plgpu.Layout.WG_STRIDED(values.shape, vec_size=1)
    return plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.uint32, layout=layout)
    )(lambda _, v: _pair_in_lanes(v, dtype))(values)


def _column_in_lanes(ref: Any, first: Any, column: Any, height: int, signed: bool | None) -> Any:
    """`read` on a lane's registers: one load a row, rows beyond the last being the last."""
    index, dtype = ir.IndexType.get(), ir.MemRefType(ref.type).element_type
    layout = mgpu.WGStridedFragLayout((height,), 1)
    last = mgpu.c(ir.MemRefType(ref.type).shape[0] - 1, index)
    first, column = (arith.index_cast(index, v.registers.item()) for v in (first, column))
    registers = []
    for lane in layout.linear_thread_idxs():
        value = memref.load(ref, [arith.minui(arith.addi(first, lane), last), column])
        registers.append(vector.broadcast(ir.VectorType.get((1,), dtype), value))
    return mgpu.FragmentedArray(_registers=np.array(registers, dtype=object), _layout=layout, _is_signed=signed)


def _words_in_lanes(ref: Any, first: Any, word: Any, count: int, height: int) -> list[Any]:
    """`read_words` on a lane's registers, as many words at once as lie at a multiple of that in every row."""
    index, i32, shape = ir.IndexType.get(), ir.IntegerType.get_signless(32), ir.MemRefType(ref.type).shape
    i64, layout = ir.IntegerType.get_signless(64), mgpu.WGStridedFragLayout((height,), 1)
    at_once = math.gcd(count, shape[1], _MOST)
    into = {1: "b32 $0", 2: "v2.b32 {$0, $1}", 4: "v4.b32 {$0, $1, $2, $3}"}[at_once]
    start = mgpu.utils.inline_ptx("mov.b64 $0, $1;", mgpu.utils.memref_ptr(ref), result_types=i64)
    first, word = (arith.index_cast(index, v.registers.item()) for v in (first, word))
    found: list[list[Any]] = [[] for _ in range(count)]
    for lane in layout.linear_thread_idxs():
        row = arith.minui(arith.addi(first, lane), mgpu.c(shape[0] - 1, index))
        offset = arith.addi(arith.muli(row, mgpu.c(shape[1], index)), word)
        at = arith.addi(start, arith.index_cast(i64, arith.muli(offset, mgpu.c(4, index))))
        for begin in range(0, count, at_once):
            load = f"ld.global.{into}, [${at_once} + {4 * begin}];"
            words = mgpu.utils.inline_ptx(load, at, result_types=[i32] * at_once, has_side_effects=True)
            for i, one in enumerate(words):
                found[begin + i].append(vector.broadcast(ir.VectorType.get((1,), i32), one))
    return [mgpu.FragmentedArray(_registers=np.array(r, dtype=object), _layout=layout, _is_signed=False) for r in found]


def read_words(
    ref: Any, first: jax.Array, word: jax.Array, count: int, height: int, interpret: bool
) -> list[jax.Array]:
    """`[ref[first : first + height, word + i] for i in range(count)]`, rows beyond the last being the last.

    Args:
      ref: uint32 `[R, W]` in device memory.
      word: a multiple of the greatest common divisor of `count`, W and 4; `word + count` at most W.
      height: a multiple of 128.
    """
    assert height % LANES == 0, height
    if interpret:
        rows = jnp.minimum(first + jnp.arange(height), ref.shape[0] - 1)
        return [ref[...][rows, word + i] for i in range(count)]
    splat, layout = plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WG_STRIDED((height,), vec_size=1)
    found = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, splat),
        return_type=[plgpu.ShapeDtypeStruct((height,), jnp.uint32, layout=layout)] * count,
    )(lambda _, r, f, w: _words_in_lanes(r, f, w, count, height))(ref, first, word)
    return list(found)


def read(ref: Any, first: jax.Array, column: jax.Array, height: int, interpret: bool) -> jax.Array:
    """`ref[first : first + height, column]` of `[R, C]` in device memory, rows beyond the last being the last.

    Args:
      height: a multiple of 128.
      column: below C.
    """
    assert height % LANES == 0, height
    if interpret:
        rows = jnp.minimum(first + jnp.arange(height), ref.shape[0] - 1)
        return ref[...][rows, column]
    splat, integer = plgpu.Layout.WG_SPLAT(()), jnp.issubdtype(ref.dtype, jnp.integer)
    signed = jnp.issubdtype(ref.dtype, jnp.signedinteger) if integer else None
    layout = plgpu.Layout.WG_STRIDED((height,), vec_size=1)
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, splat),
        return_type=plgpu.ShapeDtypeStruct((height,), ref.dtype, layout=layout),
    )(lambda _, r, f, c: _column_in_lanes(r, f, c, height, signed))(ref, first, column)
