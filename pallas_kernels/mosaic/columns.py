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

LANES = 128


def _column_in_lanes(ref: Any, first: Any, column: Any, height: int) -> Any:
    """`read` on a lane's registers: one load a row, rows beyond the last being the last."""
    index, dtype = ir.IndexType.get(), ir.MemRefType(ref.type).element_type
    layout = mgpu.WGStridedFragLayout((height,), 1)
    last = mgpu.c(ir.MemRefType(ref.type).shape[0] - 1, index)
    first, column = (arith.index_cast(index, v.registers.item()) for v in (first, column))
    registers = []
    for lane in layout.linear_thread_idxs():
        value = memref.load(ref, [arith.minui(arith.addi(first, lane), last), column])
        registers.append(vector.broadcast(ir.VectorType.get((1,), dtype), value))
    signed = False if isinstance(dtype, ir.IntegerType) else None
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
    splat = plgpu.Layout.WG_SPLAT(())
    layout = plgpu.Layout.WG_STRIDED((height,), vec_size=1)
    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, splat),
        return_type=plgpu.ShapeDtypeStruct((height,), ref.dtype, layout=layout),
    )(lambda _, r, f, c: _column_in_lanes(r, f, c, height))(ref, first, column)
