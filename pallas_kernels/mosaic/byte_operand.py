"""Codes of 8 bits -> the first operand of `wgmma` in float16, in registers: 64 bytes of a row are its 64 columns.

A lane reads sixteen neighbouring bytes of a row, and the operand's columns that it has lie scattered. But both operands
may have K in any order that they share: what stands in the operand's column 16 s + 8 h + 2 c + l, which lane c has in
instruction s, is byte 16 c + 4 s + 2 h + l. So a lane keeps its codes, and x is put into that order (`in_order`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from pallas_kernels.mosaic.operand import OF_ROWS, ROWS, VALUES, WORDS
from pallas_kernels.pairs import RAISED, scaled_byte_pair

COLUMNS = 64  # of a product, among which the order of columns is another
_PLACES = (4, 4, 2, 2)  # c, s, h, l
# Bits of a byte's place, and by how many they are shifted to the left to be bits of its column.
MOVES = ((-COLUMNS, 0), (0b110000, -3), (0b001100, 2), (0b000010, 2), (0b000001, 0))


def in_order(x: jax.Array) -> jax.Array:
    """x `[M, K]` with its columns as the operand has them, K rounded up to whole 64."""
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % COLUMNS)))
    return x.reshape(m, -1, *_PLACES).transpose(0, 1, 3, 4, 2, 5).reshape(m, -1)


def _in_lanes(words: Any, factor: Any, weight: str) -> Any:
    """`values` on a lane's registers: of each instruction rows r and r + 8 of one pair, then of the other."""
    i32, packed, found = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F16Type.get()), []
    rows = list(zip(words.registers.flat, factor.registers.flat, strict=True))
    for word in range(4):
        for second in range(2):
            for row, times in rows:
                text = scaled_byte_pair(second, weight)
                given = vector.extract(row, [], [word]), vector.extract(times, [], [0])
                found.append(mgpu.utils.bitcast(mgpu.utils.inline_ptx(text, *given, result_types=i32), packed))
    shape = mgpu.WGMMA_LAYOUT.registers_shape((ROWS, COLUMNS))
    return mgpu.FragmentedArray(
        _registers=np.array(found, dtype=object).reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
    )


def _in_plain(words: jax.Array, factor: jax.Array, weight: str) -> jax.Array:
    """`values` in plain operations."""
    dtype = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}[weight]
    codes = jax.lax.bitcast_convert_type(words, dtype).reshape(ROWS, COLUMNS)
    scale = jax.lax.bitcast_convert_type(factor.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    return in_order((codes.astype(jnp.float32) * scale[:, None] * 2.0 ** -RAISED[weight]).astype(jnp.float16))


def values(words: jax.Array, factor: jax.Array, *, weight: str, interpret: bool) -> jax.Array:
    """Codes times scales, float16 `[64, 64]` in `VALUES`, columns as `in_order` has them.

    Args:
      words: uint32 `[64, 16]` in `WORDS`.
      factor: of each row, pairs of float16 of `2 ** RAISED[weight]` times the scale: uint32 `[64]` in `OF_ROWS`.
      weight: "int8" or "e4m3".
      interpret: plain operations instead of PTX.
    """
    if interpret:
        return _in_plain(words, factor, weight)
    return plgpu.inline_mgpu(
        arg_types=(WORDS, OF_ROWS), return_type=plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float16, layout=VALUES)
    )(lambda _, w, f: _in_lanes(w, f, weight))(words, factor)
