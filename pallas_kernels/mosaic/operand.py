"""Words of packed codes -> the first operand of `wgmma`, in registers: uint32 `[64, 16]` in, `[64, 128]` out.

Lane `4r + c` of a warp holds, of rows r and r + 8 of the warp's sixteen, words `4c .. 4c + 3` of a block of 128
(`WORDS`, one 16-byte load a row). The operand wants of that lane, for the sixteen columns `16i ..` of instruction i,
four registers of two neighbours in k:

    register    0           1               2               3
    row         r           r + 8           r               r + 8
    k - 16i     2c, 2c + 1  2c, 2c + 1      8 + 2c, ...     8 + 2c, ...

The packed order puts the pair `k = 8t + 2c + l` (t = 2i, 2i + 1) at nibble `t % 4` of both halves of word
`4c + t // 4`, so that every value is made of its own lane's words by a shift, a mask and an exponent, and none changes
its lane:

    integers    (word >> 4(t % 4)) & 0x000f000f | 0x43004300  the bf16 pair 128 + code;  then  + (-128 - zero), exact
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

BLOCK = 128
ROWS = 64  # of a warpgroup: sixteen a warp
WORDS_A_BLOCK = 16

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

_PAIR = {"bfloat16": "bf16x2", "float16": "f16x2"}
# What `| exponent` adds to a code: bf16 has 7 bits of mantissa, f16 has 10.
_EXPONENT = {"bfloat16": 0x4300, "float16": 0x6400}
_OFFSET = {"bfloat16": 128, "float16": 1024}
_MIDDLE = 8


def minus(zero: jax.Array, dtype: str) -> jax.Array:
    """The register that turns a pair `exponent | code` into `code - zero`: `-offset - zero` in both halves.

    Args:
      zero: int32, within int8.
    """
    if dtype == "bfloat16":  # the upper half of float32, exact: at most 8 bits
        exact = -(_OFFSET[dtype] + zero.astype(jnp.float32))
        half = jax.lax.bitcast_convert_type(exact, jnp.uint32) >> 16
    else:  # consecutive halves are 1 apart from 1024 on, 1/2 below
        half = (0xE400 + zero + jnp.minimum(zero, 0)).astype(jnp.uint32)
    return half * jnp.uint32(0x10001)


def sources(which: range) -> list[tuple[int, int, int]]:
    """Of each register of the operand's columns `8t ..`, t in `which`: half of the rows, word of its four, nibble."""
    return [(half, t // 4, t % 4) for t in which for half in (0, 1)]


def _integer_pair(word: ir.Value, t: int, dtype: str, subtrahend: ir.Value) -> ir.Value:
    """Nibble t of both halves of a word -> the pair of values."""
    i32 = ir.IntegerType.get_signless(32)
    if t:
        word = arith.shrui(word, mgpu.c(4 * t, i32))
    exponent = _EXPONENT[dtype]
    return mgpu.utils.inline_ptx(
        f"{{ .reg .b32 v; lop3.b32 v, $1, 0x000f000f, 0x{exponent:04x}{exponent:04x}, 0xEA; "
        f"add.rn.{_PAIR[dtype]} $0, v, $2; }}",
        word,
        subtrahend,
        result_types=i32,
    )


def _in_lanes(words: Any, subtrahend: Any, dtype: str, which: range) -> Any:
    """`values` on a lane's registers."""
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(np.dtype(dtype)))
    found = [vector.extract(v, [], [j]) for v in words.registers.flat for j in range(4)]  # row half, j
    middle = np.full(2, -_OFFSET[dtype] - _MIDDLE, np.dtype(dtype)).view(np.int32).item()
    less = [mgpu.c(middle, i32)] * 2
    if subtrahend is not None:
        less = [vector.extract(v, [], [0]) for v in subtrahend.registers.flat]
    registers = [
        mgpu.utils.bitcast(_integer_pair(found[4 * half + j], nibble, dtype, less[half]), pair)
        for half, j, nibble in sources(which)
    ]
    shape = mgpu.WGMMA_LAYOUT.registers_shape((ROWS, 8 * len(which)))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
    )


def _in_plain(words: jax.Array, subtrahend: jax.Array | None, dtype: str) -> jax.Array:
    """`values` in plain operations."""
    # [row, c, j, l, t % 4] -> k = 32j + 8(t % 4) + 2c + l
    shifts = 16 * jnp.arange(2)[:, None] + 4 * jnp.arange(4)
    codes = (words.reshape(ROWS, 4, 4, 1, 1) >> shifts.astype(jnp.uint32)) & 15
    codes = codes.transpose(0, 2, 4, 1, 3).reshape(ROWS, BLOCK).astype(jnp.int32)
    if subtrahend is None:
        return (codes - _MIDDLE).astype(dtype)
    less = jax.lax.bitcast_convert_type(subtrahend.astype(jnp.uint16), np.dtype(dtype))
    return (codes + _OFFSET[dtype]).astype(dtype) + less[:, None]


def values(
    words: jax.Array, subtrahend: jax.Array | None, dtype: str, piece: int, pieces: int, interpret: bool
) -> jax.Array:
    """The values of a piece of a block.

    Args:
      words: uint32 `[64, 16]` in `WORDS`.
      subtrahend: of `minus`, uint32 `[64]` in `OF_ROWS`; None for the middle code.
      dtype: "bfloat16" or "float16".
      piece: which of `pieces` equal ones, 1, 2, 4 or 8.
      interpret: plain operations instead of PTX.

    Returns:
      `[64, 128 / pieces]` in `dtype`, in `VALUES`.
    """
    width = BLOCK // pieces
    if interpret:
        return _in_plain(words, subtrahend, dtype)[:, piece * width : (piece + 1) * width]
    which = range(piece * width // 8, (piece + 1) * width // 8)  # t
    given = [words] if subtrahend is None else [words, subtrahend]
    return plgpu.inline_mgpu(
        arg_types=(WORDS, OF_ROWS)[: len(given)],
        return_type=plgpu.ShapeDtypeStruct((ROWS, width), jnp.dtype(dtype), layout=VALUES),
    )(lambda _, *a: _in_lanes(a[0], a[1] if len(a) > 1 else None, dtype, which))(*given)
