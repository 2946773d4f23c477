"""Words of packed codes -> the first operand of `wgmma`, in registers: uint32 `[64, 16]` in, `[64, 128]` out.

Lane `4r + c` of a warp holds, of rows r and r + 8 of the warp's sixteen, words `4c .. 4c + 3` of a block of 128
(`WORDS`, one 16-byte load a row). The operand wants of that lane, for the sixteen columns `16i ..` of instruction i,
four registers of two neighbours in k:

    register    0           1               2               3
    row         r           r + 8           r               r + 8
    k - 16i     2c, 2c + 1  2c, 2c + 1      8 + 2c, ...     8 + 2c, ...

The packed order puts the pair `k = 8t + 2c + l` (t = 2i, 2i + 1) at nibble `t % 4` of both halves of word
`4c + t // 4`, so that every value is made of its own lane's words by shifts and masks (`pallas_kernels.pairs`), and
none changes its lane.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from pallas_kernels.pairs import MAGIC, RAISED, TABLES, pair, scaled, scaled_code

BLOCK = 128
ROWS = 64  # of a warpgroup: sixteen a warp
WORDS_A_BLOCK = 16
MIDDLE = 8

VALUES = plgpu.Layout.WGMMA
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
# `VALUES` element by element, as a transposed store of 32 bits wants them.
SINGLE = plgpu.Layout.TILED(
    Tiling(((ROWS, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
# A lane's four words of a row are one vector.
WORDS = plgpu.Layout.TILED(
    Tiling(((ROWS, 16), (16, 16), (8, 16), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def sources(which: range) -> list[tuple[int, int, int]]:
    """Of each register of the operand's columns `8t ..`, t in `which`: t, half of the rows, word of its lane's four."""
    return [(t, half, t // 4) for t in which for half in (0, 1)]


def _asm(text: str, *registers: ir.Value) -> ir.Value:
    return mgpu.utils.inline_ptx(text, *registers, result_types=ir.IntegerType.get_signless(32))


def _in_lanes(
    words: Any, zero: list[Any], factors: list[Any], weight: str, dtype: str, which: range, raised: bool
) -> Any:
    """`values` on a lane's registers."""
    packed = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(np.dtype(dtype)))
    of_lane = [[vector.extract(row, [], [j]) for j in range(4)] for row in words.registers.flat]
    less, times = ([[vector.extract(row, [], [0]) for row in a.registers.flat] for a in of] for of in (zero, factors))
    registers = []
    for t, half, j in sources(which):
        given, factor = ([a[(t - which.start) * len(a) // len(which)][half]] if a else [] for a in (less, times))
        if raised:
            value = _asm(scaled_code(t % 4), of_lane[half][j], *factor)
        else:
            value = _asm(pair(t % 4, weight, dtype, "$2" if less else None), of_lane[half][j], *given)
        if times and not raised:
            value = _asm(scaled("$2", dtype), value, *factor)
        registers.append(mgpu.utils.bitcast(value, packed))
    shape = mgpu.WGMMA_LAYOUT.registers_shape((ROWS, 8 * len(which)))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
    )


def _of_pair(pair: jax.Array, dtype: str) -> jax.Array:
    """A register of the same value twice -> that value."""
    return jax.lax.bitcast_convert_type(pair.astype(jnp.uint16), np.dtype(dtype))[:, None]


def _in_plain(
    words: jax.Array,
    zero: list[jax.Array],
    factors: list[jax.Array],
    weight: str,
    dtype: str,
    which: range,
    raised: bool,
) -> jax.Array:
    """`values` in plain operations."""
    # [row, c, j, l, t % 4] -> k = 32j + 8(t % 4) + 2c + l
    shifts = 16 * jnp.arange(2)[:, None] + 4 * jnp.arange(4)
    codes = (words.reshape(ROWS, 4, 4, 1, 1) >> shifts.astype(jnp.uint32)) & 15
    codes = codes.transpose(0, 2, 4, 1, 3).reshape(ROWS, BLOCK).astype(jnp.int32)
    codes = codes[:, 8 * which.start : 8 * which.stop]

    def of_columns(pairs: list[jax.Array]) -> jax.Array:
        return jnp.repeat(
            jnp.concatenate([_of_pair(p, dtype) for p in pairs], axis=1), codes.shape[1] // len(pairs), axis=1
        )

    if raised:
        return ((codes - MIDDLE) * of_columns(factors).astype(jnp.float32) * 2.0 ** -RAISED["int4"]).astype(dtype)
    if weight in TABLES:
        found = jnp.zeros(codes.shape, dtype)
        for i, entry in enumerate(TABLES[weight]):
            found = jnp.where(codes == i, jnp.asarray(entry, dtype), found)
    else:
        offset = MAGIC[dtype][1]
        found = (codes + offset).astype(dtype)
        found = found + (of_columns(zero) if zero else jnp.asarray(-offset - MIDDLE, dtype))
    return found * of_columns(factors) if factors else found


def values(
    words: jax.Array,
    *,
    weight: str,
    dtype: str,
    piece: int,
    pieces: int,
    zero: list[jax.Array],
    factors: list[jax.Array],
    interpret: bool,
    raised: bool = False,
) -> jax.Array:
    """The values of a piece of a block.

    Args:
      words: uint32 `[64, 16]` in `WORDS`.
      weight: "int4", or a key of `TABLES`.
      dtype: "bfloat16" or "float16".
      piece: which of `pieces` equal ones, 1, 2, 4 or 8.
      zero: of integers, `-offset - zero point` (`pallas_kernels.pairs.MAGIC`) as pairs: uint32 `[64]` in `OF_ROWS`; as
        many equal parts of the piece have one each. The middle code if empty.
      factors: likewise, what values are multiplied by, rounded to `dtype`. None if empty.
      interpret: plain operations instead of PTX.
      raised: factors are those times 2^24; only for int4 about its middle code in float16, which is decoded in two
        instructions a pair then.

    Returns:
      `[64, 128 / pieces]` in `dtype`, in `VALUES`.
    """
    which = range(16 * piece // pieces, 16 * (piece + 1) // pieces)  # t
    if interpret:
        return _in_plain(words, zero, factors, weight, dtype, which, raised)
    rows = [OF_ROWS] * (len(zero) + len(factors))
    return plgpu.inline_mgpu(
        arg_types=(WORDS, *rows),
        return_type=plgpu.ShapeDtypeStruct((ROWS, 8 * len(which)), jnp.dtype(dtype), layout=VALUES),
    )(lambda _, w, *a: _in_lanes(w, list(a[: len(zero)]), list(a[len(zero) :]), weight, dtype, which, raised))(
        words, *zero, *factors
    )
