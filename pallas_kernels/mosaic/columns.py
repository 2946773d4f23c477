"""Scales and zero points: columns of `[N, groups]`, brought by the producer into shared memory, ready for use.

A row's entries are no multiple of 16 bytes in general, so that the copy engine cannot fetch a tile of them. The
warpgroup that feeds it has 128 idle lanes: each loads the entries of its rows, turns them into 32 bits, float32 or a
pair of 16-bit floats, and stores them by group, where the warps that multiply read them with no conflict and nothing
left to convert.
"""

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
