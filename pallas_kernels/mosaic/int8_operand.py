"""Words of 4-bit codes -> the first operand of `wgmma` on int8, in registers: uint32 `[64, 16]` in, `[64, 128]` out.

`wgmma` wants of lane 4r + c, for the 32 columns of an instruction, four registers of four neighbours each:

    register    0                   1                   2                        3
    row         r                   r + 8               r                        r + 8
    column      4c .. 4c + 3        4c .. 4c + 3        16 + 4c ..               16 + 4c ..

The packed order gives that lane, in word j of its four of a block of 128 columns, just eight of the columns 32j ..,
nibble t of half l being column 8t + 2c + l. Nibbles 0 and 2 of both halves are made one register, 1 and 3 the other, by
the same operations on all four bytes. So a lane keeps its codes, and what stands in the operand's column 2i + q is
column 16q + i: x is put into that order (`in_order`), which is a transposition of 2 x 16 within each 32 columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels.mosaic.operand import BLOCK, MIDDLE, ROWS, VALUES, WORDS

COLUMNS = 32  # of an instruction, among which the order of columns is another
OPERAND = plgpu.Layout.WGMMA_8BIT


def in_order(x: jax.Array) -> jax.Array:
    """x `[M, K]` with its columns as the operand has them, K rounded up to whole 32."""
    m, k = x.shape
    halves = jnp.pad(x, ((0, 0), (0, -k % COLUMNS))).view(jnp.uint8).reshape(m, -1, 2, COLUMNS // 2).astype(jnp.uint16)
    pairs = halves[:, :, 0] | halves[:, :, 1] << 8
    return pairs.view(jnp.int8).reshape(m, -1)


def sources() -> list[tuple[int, int, int]]:
    """Of each register of the operand: word of its lane's four, half of the rows, first of its nibbles."""
    return [(j, half, first) for j in range(4) for first in (0, 1) for half in (0, 1)]


def _less_middle(nibbles: str) -> str:
    """PTX of `$0` = codes less the middle one, in bytes, of `$1`. 128 + code - 8 borrows from no neighbour."""
    return (
        f"{{ .reg .b32 a; {nibbles} lop3.b32 a, a, 0x0F0F0F0F, 0x80808080, 0xEA; "  # (a & b) | c
        f"sub.u32 a, a, {0x01010101 * MIDDLE:#x}; xor.b32 $0, a, 0x80808080; }}"
    )


_DECODE = (_less_middle("mov.b32 a, $1;"), _less_middle("shr.u32 a, $1, 4;"))


def _in_lanes(words: Any) -> Any:
    """`values` on a lane's registers."""
    i32, packed = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    rows, found = list(words.registers.flat), []
    for j, half, first in sources():
        value = mgpu.utils.inline_ptx(_DECODE[first], vector.extract(rows[half], [], [j]), result_types=i32)
        found.append(mgpu.utils.bitcast(value, packed))
    shape = mgpu.WGMMA_LAYOUT_8BIT.registers_shape((ROWS, BLOCK))
    return mgpu.FragmentedArray(
        _registers=np.array(found, dtype=object).reshape(shape), _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=True
    )


def _in_plain(words: jax.Array) -> jax.Array:
    """`values` in plain operations."""
    # [row, c, j, q, first, l] -> column 32j + 16 first + 4c + 2l + q of nibble 2q + first of half l
    q, first, half = (jax.lax.broadcasted_iota(jnp.uint32, (2, 2, 2), axis) for axis in range(3))
    codes = (words.reshape(ROWS, 4, 4, 1, 1, 1) >> (16 * half + 8 * q + 4 * first)) & 15
    return (codes.transpose(0, 2, 4, 1, 5, 3).reshape(ROWS, BLOCK).astype(jnp.int32) - MIDDLE).astype(jnp.int8)


def values(words: jax.Array, interpret: bool) -> jax.Array:
    """Codes less the middle one, int8 `[64, 128]` in `OPERAND`, of words in `WORDS`; columns as `in_order` has them."""
    if interpret:
        return _in_plain(words)
    return plgpu.inline_mgpu(
        arg_types=(WORDS,), return_type=plgpu.ShapeDtypeStruct((ROWS, BLOCK), jnp.int8, layout=OPERAND)
    )(lambda _, w: _in_lanes(w))(words)


def _begin(sums: Any, values: Any, x: ir.Value, swizzle: int, last: int) -> Any:
    """`begin` on a lane's registers; x tiled `[M / 8, 1, 8, 128]`."""
    acc = mgpu.WGMMAAccumulator.from_registers(sums)._value
    x = mgpu.utils.memref_transpose(x, (1, 0, 3, 2))
    (at, (_, (stride, *_))), _, fastest = mma_utils.create_descriptor(
        x, swizzle=swizzle, large_tile=(BLOCK, BLOCK), group_size=(BLOCK, sums.shape[1]), logical_k_major=True
    )
    assert fastest == mma_utils.Dim.K, fastest
    values, registers, s8 = wgmma_fence(values), acc.registers, ir.IntegerType.get_signless(8)
    for first, width in ((0, BLOCK - last), (BLOCK - last, last)):
        offset = mgpu.utils.c(mma_utils.encode_addr(first // COLUMNS * stride), ir.IntegerType.get_signless(64))
        registers = wgmma_m64(
            registers, values[:, first : first + width], arith.addi(at, offset), a_transpose=None, b_transpose=False,
            a_k_stride=None, b_k_stride=stride, n=sums.shape[1], swizzle=width, a_element_type=s8, b_element_type=s8,
        )  # fmt: skip
        mgpu.utils.inline_ptx("wgmma.commit_group.sync.aligned;", has_side_effects=True, convergent=True)
    return mgpu.WGMMAAccumulator(
        _value=mgpu.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=True),
        _original_layout=sums.layout,
        _sync=False,
    ).value


def begin(sums: jax.Array, values: jax.Array, x: Any, transforms: tuple[Any, Any], last: int) -> jax.Array:
    """Starts `sums + values @ x.T` and comes back.

    Args:
      sums: int32 `[64, M]` in `operand.VALUES`.
      values: of `values`.
      x: int8 `[M, 128]` in shared memory, M at most 256.
      transforms: how it lies there: tiles of 8 rows, swizzled.
      last: columns, 32, 64 or 96, whose products are a group of their own, the second.

    Returns:
      the sums, in the same registers, which must not be touched before `sums.finished`.
    """
    return plgpu.inline_mgpu(
        arg_types=(VALUES, OPERAND, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.int32, layout=VALUES),
    )(lambda _, a, v, ref: _begin(a, v, ref, transforms[1].swizzle, last))(sums, values, x)
