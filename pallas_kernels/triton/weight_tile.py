"""A tile of a packed weight, dequantized inside a kernel: words in memory -> values of x's type, in the natural order.

    value[n, k] = (code[n, k] - zero_point[n, k // g]) * scale[n, k // g], or an entry of a table for the difference

Scales multiply the values, two an instruction, and are rounded to x's type before, the product after (bfloat16, e8m0
and e4m3 scales are exact in bfloat16; e2m1 times the last two is as well). Who cannot have scales wait for sums, or has
more sums than values, takes it so.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import columns, edges
from pallas_kernels.triton.operand import BLOCK, PLANES, operand, operand_pieces, plane_words


@dataclasses.dataclass(frozen=True)
class Weight:
    """Static facts of a weight.

    Attributes:
      n, blocks: rows, and blocks of 128 columns, as stored.
      weight: "int2" .. "int6", "e2m1", "nf4" or "fp4".
      bits: of a code.
      group: elements that share a scale; more than all of K where a row has one.
      scale: dtype of the scales; None where there is one for all, which is no concern of a tile's.
      zero_point: dtype of the zero points; None where there are none.
      one_row: whether one zero point is for all rows.
      interpret: plain operations instead of PTX.
    """

    n: int
    blocks: int
    weight: str
    bits: int
    group: int
    scale: str | None
    zero_point: str | None
    one_row: bool
    interpret: bool

    @property
    def per_block(self) -> int:
        """Groups in a block of 128."""
        return max(1, BLOCK // self.group)

    def refs(self, refs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """Words, scales and zero points among the references of a kernel whose first are `operands`."""
        rest = iter(refs)
        return next(rest), next(rest) if self.scale else None, next(rest) if self.zero_point else None


def describe(
    packed: jax.Array, scale: jax.Array, zero_point: jax.Array | None, weight: str, group: int, interpret: bool
) -> Weight:
    """The facts of these arrays; group: of K or more where a row has one scale."""
    n, blocks, words = packed.shape
    return Weight(
        n, blocks, weight, words // 4, group if scale.shape[1] > 1 else 2 * blocks * BLOCK,
        None if scale.size == 1 else scale.dtype.name, None if zero_point is None else zero_point.dtype.name,
        scale.shape[0] == 1, interpret,
    )  # fmt: skip


def operands(weight: Weight, packed: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> list[jax.Array]:
    """The arrays that a kernel reads of the weight."""
    entries = ([] if weight.scale is None else [scale]) + ([] if zero_point is None else [zero_point])
    return [packed, *(columns.as_words(a) for a in entries)]


def _entries(
    weight: Weight, of: int, ref: Any, dtype: str, rows: jax.Array, column: jax.Array, group: jax.Array
) -> jax.Array:
    """Scales or zero points of a tile.

    Args:
      of: blocks of a tile.
      rows: `[R]`, rows of the weight.
      column: of tiles, each `of` blocks wide.
      group: int32 `[R, C]`, for each of C results the group inside the tile's blocks.

    Returns:
      float32 `[R, C]`, or `[R, 1]` where the tile's blocks are in one group.
    """
    rows = jnp.zeros_like(rows) if weight.one_row else rows
    share = weight.group // of  # `columns` counts by blocks of 128, each a tile's share of the columns
    return columns.read(ref, dtype, rows, column, share, None if share >= BLOCK else group)


def _shifted_and_scaled(values: jax.Array, shift: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    """`(values + shift) * scale` in the values' type, rounded after either step; pairs of values in a register."""
    shift, scale = (jnp.broadcast_to(a.astype(values.dtype), values.shape) for a in (shift, scale))
    if interpret:
        return (values + shift) * scale
    pair, one = {"bfloat16": ("bf16x2", 0x3F80), "float16": ("f16x2", 0x3C00)}[values.dtype.name]
    (found,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .b32 v, o, z; mov.b32 o, {one * 0x10001}; mov.b32 z, 0x80008000; "
        f"fma.rn.{pair} v, $1, o, $2; fma.rn.{pair} $0, v, $3, z; }}",
        args=[values, shift, scale], constraints="=r,r,r,r", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, values.dtype)],
    )  # fmt: skip
    return found


def values(
    weight: Weight, refs: tuple[Any, Any, Any], row: jax.Array, column: jax.Array, tile: tuple[int, int], dtype: str
) -> jax.Array:
    """The weight's values in one tile.

    Args:
      refs: of `Weight.refs`.
      row, column: which tile.
      tile: rows of it, and blocks of 128 columns.
      dtype: "bfloat16" or "float16".

    Returns:
      `[tile[0], tile[1] * 128]` in `dtype`; past the weight's edges anything.
    """
    (tile_n, of), (w_ref, s_ref, z_ref) = tile, refs
    height, first = tile_n * of, row * tile_n  # a row for each block
    index = jnp.arange(height)
    rows = jnp.minimum(first + index // of, weight.n - 1)
    first_group = (index % of * weight.per_block)[:, None]
    entries = functools.partial(_entries, weight, of)

    def of_values(ref: Any, name: str) -> jax.Array:
        inside = jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) // weight.group
        return entries(ref, name, rows, column, first_group + (inside if weight.per_block > 1 else 0))

    def of_words() -> list[jax.Array]:
        """Scales for the words at each shift, t_low."""
        wide = PLANES[weight.bits][0]
        shifts = 16 // wide
        high = jax.lax.broadcasted_iota(jnp.int32, (1, 4 * wide), 1) % wide
        groups = [first_group + (high * shifts + low) * 8 // weight.group for low in range(shifts)]
        return [entries(s_ref, weight.scale or "", rows, column, group) for group in groups]

    planes = [
        edges.load(w_ref, (first, column * of, word), (tile_n, of, words), (tile_n, of, 1)).reshape(height, words)
        for word, words in plane_words(weight.bits)
    ]
    read = functools.partial(operand, planes, weight.weight, weight.bits, dtype, interpret=weight.interpret)
    if z_ref is None:
        found = read(None if weight.scale is None else of_words())
    elif weight.per_block == 1 and weight.zero_point == "int8":
        scales = None if weight.scale is None else [of_values(s_ref, weight.scale)]
        zeros = [of_values(z_ref, weight.zero_point)]
        (found,) = operand_pieces(planes, weight.weight, weight.bits, dtype, 1, scales, zeros, weight.interpret)
    else:
        shift = 2.0 ** (weight.bits - 1) - of_values(z_ref, weight.zero_point or "")
        scale = jnp.ones((1, 1)) if weight.scale is None else of_values(s_ref, weight.scale)
        found = _shifted_and_scaled(read(), shift, scale, weight.interpret)
    return found.reshape(tile_n, of * BLOCK)
