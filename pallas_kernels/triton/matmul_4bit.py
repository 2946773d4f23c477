"""y = residual + activation(x @ w + bias) with weights of four bits: int4, e2m1 (MXFP4, NVFP4), NF4, FP4.

    y[m, n] = sum_k x[m, k] * value(code[n, k]) * scale[n, k // g]
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, K]
    packed     uint32 [N, B, 16], B = ceil(K / 128): the packed order of four bits (`decode`)
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128; or [1, 1]
    zero_point int8 or float, like scale; bias [N]; residual [M, N]; global_scale float32 [] or [N]

Work: a program owns `tile_n` rows of the weight and `tile_m` of x, and a share of the blocks of 128 (`split_k`). For
one block:

    16 words a row --halves--> pairs --8 nibble positions--> 8 tiles [tile_n, 16] of values --dot--> += x [tile_m, 16]

The weight is the operand that stays in registers: words come through asynchronous copies into shared memory in the very
layout of `mma`'s first operand, and no value ever changes its thread. x comes in the order of the words: a small
transpose that XLA fuses into whatever made x. With `split_k` > 1 partial sums go out in float32, and one XLA fusion
adds them and finishes.

Numerics: products of codes and x are exact in the tensor cores, sums float32. A scale of 128 codes or more multiplies
the block's float32 sum. Smaller groups: power-of-two (e8m0) and e4m3 scales times e2m1 are exact in bfloat16, so they
multiply the values; other scales get a sum of their own for each group (x masked). One rounding, of the result.
Exception: NF4 and FP4 values are rounded to x's type.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import decode
from pallas_kernels.triton.finish import finish_sums
from pallas_kernels.triton.tiles import Tile, tile_for

BLOCK, WORDS = 128, 16


def unsupported(
    m: int, k: int, n: int, *, weight: str, group: int, block_n: int, x_dtype: str, x_format: str | None,
    scale_dtype: str, transposed: bool, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if x_format is not None or x_dtype not in ("bfloat16", "float16"):
        return f"it takes x in bfloat16 or float16, not in {x_format or x_dtype}"
    if block_n not in (1, n) or (block_n == n != 1 and group < k):
        return f"its scales belong to one row or to all, not to {block_n} rows"
    if group < k and group not in (16, 32, 64) and group % BLOCK:
        return f"groups of {group}: it knows 16, 32, 64 and multiples of 128"
    if x_dtype == "float16" and scale_dtype == "float8_e8m0fnu":
        return "e8m0 scales exceed the range of float16"
    return None


def configs(m: int, k: int, n: int, *, smem: int, sms: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose shared memory fits, and that fill the chip without slivers."""
    blocks = -(-k // BLOCK)
    found = []
    for tile_n, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)):
        for tile_m in {16, min(64, max(16, 1 << (m - 1).bit_length()))}:
            for split_k in (1, 2, 4, 8, 16):
                programs = -(-n // tile_n) * -(-m // tile_m) * split_k
                if split_k > 1 and (blocks // split_k < 2 or programs > 16 * sms):
                    continue
                for stages in (3, 4, 5):
                    if stages * (tile_n * 64 + tile_m * 256) <= smem:
                        found.append(dataclasses.asdict(Tile(tile_m, tile_n, split_k, warps, stages)))
    return found


def in_word_order(x: jax.Array, blocks: int) -> jax.Array:
    """x `[M, K]`, zero-padded to whole blocks, inside each block of 128 sorted by (nibble position, word)."""
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - k)))
    x = x.reshape(m, blocks, 4, 2, 2, 4, 2)  # j, s, h, c, l
    return x.transpose(0, 1, 6, 3, 4, 5, 2).reshape(m, blocks * BLOCK)  # l, s, h | c, j


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    m: int
    n: int
    blocks: int
    weight: str
    group: int  # elements that share a scale; blocks * 128 where a row has one
    columns: int  # scales a row
    scale_kind: str  # float, e4m3, e8m0
    one_row: bool  # one scale for all rows
    zero_point: bool
    tile: Tile
    interpret: bool

    @property
    def per_block(self) -> int:
        """Groups in a block of 128."""
        return max(1, BLOCK // self.group)

    @property
    def scale_last(self) -> bool:
        """Whether one scale a row can wait for the end."""
        return self.columns == 1 and not self.scales_values

    @property
    def scales_values(self) -> bool:
        """Whether scales multiply the values: exact for these formats."""
        return self.per_block > 1 and self.scale_kind != "float"


def _column_groups(shape: tuple[int, int], per_block: int, s: int) -> jax.Array:
    """Group, inside its block, of each column of a tile of words at nibble positions with this s."""
    j = jax.lax.broadcasted_iota(jnp.int32, shape, 1) % 4
    return {2: j // 2, 4: j, 8: 2 * j + s}[per_block]


def _as_float(raw: jax.Array, kind: str) -> jax.Array:
    """Scales in float32; e4m3 and e8m0 arrive as bytes."""
    if kind == "float":
        return raw.astype(jnp.float32)
    bits = raw.astype(jnp.uint32)
    if kind == "e8m0":
        bits = jnp.where(bits == 0, jnp.uint32(1 << 22), bits << 23)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jax.lax.bitcast_convert_type(bits << 20, jnp.float32) * np.float32(2.0**120)


def _kernel(plan: _Plan, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, dtype = plan.tile, x_ref.dtype.name
    z_ref, out_ref = (refs[0] if plan.zero_point else None), refs[-1]
    first_row, first_x = pl.program_id(0) * tile.tile_n, pl.program_id(2) * tile.tile_m
    rows = first_row + jnp.arange(tile.tile_n)

    def live(shape: tuple[int, int], axis: int, first: jax.Array, size: int) -> jax.Array | None:
        """Mask of a tile at the edge; None where tiles divide the size."""
        if size % shape[axis] == 0:
            return None
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size

    def load(ref: Any, mask: jax.Array | None, policy: str | None = None) -> jax.Array:
        return plgpu.load(ref, mask=mask, other=None if mask is None else 0, eviction_policy=policy)

    x_live = live((tile.tile_m, WORDS), 0, first_x, plan.m)
    w_live = live((tile.tile_n, WORDS), 0, first_row, plan.n)

    def load_x(block: jax.Array, position: int) -> jax.Array:
        start = block * BLOCK + position * WORDS
        return load(x_ref.at[pl.ds(first_x, tile.tile_m), pl.ds(start, WORDS)], x_live)

    def load_words(block: jax.Array) -> jax.Array:
        # evict_first: weights are read once and would push x and scales out of L2
        return load(w_ref.at[pl.ds(first_row, tile.tile_n), pl.ds(block * WORDS, WORDS)], w_live, "evict_first")

    def at_groups(ref: Any, group: jax.Array) -> jax.Array:
        """`ref[rows, group]` for groups `[1, C]`: `[tile_n, C]`, clamped past the edges."""
        shape = (tile.tile_n, group.shape[1])
        row = jnp.zeros_like(rows) if plan.one_row else jnp.minimum(rows, plan.n - 1)
        column = jnp.broadcast_to(jnp.minimum(group, plan.columns - 1), shape)
        return plgpu.load(ref.at[jnp.broadcast_to(row[:, None], shape), column])

    def word_groups(block: jax.Array, s: int) -> jax.Array:
        """Group of each of a block's words, `[1, 16]`, at positions with this s; `[1, 1]` for whole blocks."""
        if plan.per_block == 1:
            return jnp.full((1, 1), block * BLOCK // plan.group)
        return block * plan.per_block + _column_groups((1, WORDS), plan.per_block, s)

    def scale_of(group: jax.Array) -> jax.Array:
        return _as_float(at_groups(s_ref, group), plan.scale_kind)

    def values(block: jax.Array) -> Callable[[int], jax.Array]:
        """`position -> [tile_n, 16]` values of one block, scaled where that is exact."""
        read = decode.reader(plan.weight, load_words(block), dtype, plan.interpret)
        if not plan.scales_values:
            return read
        scale = [scale_of(word_groups(block, s)).astype(dtype) for s in (0, 1)]
        return lambda position: read(position) * scale[position // 2 % 2]

    def products(block: jax.Array, value: Callable[[int], jax.Array], group: int | None) -> tuple[jax.Array, jax.Array]:
        """Sums over the block, or over one of its groups (the x of others is masked): of value * x, and of x."""
        part = sum_x = jnp.zeros((tile.tile_n, tile.tile_m), jnp.float32)
        for position in range(decode.POSITIONS):
            x = load_x(block, position)
            if group is not None:
                mine = _column_groups((tile.tile_m, WORDS), plan.per_block, position // 2 % 2) == group
                x = jnp.where(mine, x, jnp.zeros((), x.dtype))
            part = part + plgpu.dot(value(position), x.T)
            if z_ref is not None:  # by the tensor cores, which wait for memory: the sums lie where `part` does
                sum_x = sum_x + plgpu.dot(jnp.ones((tile.tile_n, WORDS), x.dtype), x.T)
        return part, sum_x

    def scaled(block: jax.Array, value: Callable[[int], jax.Array], group: int | None) -> jax.Array:
        """`products` with zero point and scale of their one group."""
        part, sum_x = products(block, value, group)
        column = block * BLOCK // plan.group if group is None else block * plan.per_block + group
        column = jnp.full((1, 1), column)
        if z_ref is not None:
            part = part + (8.0 - at_groups(z_ref, column).astype(jnp.float32)) * sum_x
        return part if plan.scale_last else part * scale_of(column)

    def step(block: jax.Array, total: jax.Array) -> jax.Array:
        value = values(block)
        if plan.scales_values:
            return total + products(block, value, None)[0]
        for group in [None] if plan.per_block == 1 else range(plan.per_block):
            total = total + scaled(block, value, group)
        return total

    share = -(-plan.blocks // tile.split_k)
    start = pl.program_id(1) * share
    stop = jnp.minimum(start + share, plan.blocks)
    total = jax.lax.fori_loop(start, stop, step, jnp.zeros((tile.tile_n, tile.tile_m), jnp.float32))
    if plan.scale_last:
        total = total * scale_of(jnp.zeros((1, 1), jnp.int32))
    out = out_ref.at[pl.program_id(1), pl.ds(first_x, tile.tile_m), pl.ds(first_row, tile.tile_n)]
    inside = [
        live((tile.tile_m, tile.tile_n), 0, first_x, plan.m),
        live((tile.tile_m, tile.tile_n), 1, first_row, plan.n),
    ]
    masks = [mask for mask in inside if mask is not None]
    plgpu.store(out, total.T.astype(out_ref.dtype), mask=functools.reduce(jnp.logical_and, masks) if masks else None)


_BYTES = {"float8_e4m3fn": "e4m3", "float8_e8m0fnu": "e8m0"}


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    group: int,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    sms: int = 132,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: "int4", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Tile`; empty takes `tile_for` the shape and `sms` multiprocessors.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, _k), (n, blocks) = x.shape, packed.shape[:2]
    tile = Tile(**config) if config else tile_for(m, n, blocks, sms)
    kind = _BYTES.get(scale.dtype.name, "float")
    plan = _Plan(
        m, n, blocks, weight, group if scale.shape[1] > 1 else blocks * BLOCK, scale.shape[1], kind,
        scale.shape[0] == 1 < n, zero_point is not None, tile, interpret,
    )  # fmt: skip
    whole = tile.split_k == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    operands = [in_word_order(x, blocks), packed.reshape(n, blocks * WORDS)]
    operands.append(scale if kind == "float" else jax.lax.bitcast_convert_type(scale, jnp.uint8))
    operands += [] if zero_point is None else [zero_point]
    partial = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(-(-n // tile.tile_n), tile.split_k, -(-m // tile.tile_m)),
        out_shape=jax.ShapeDtypeStruct((tile.split_k, m, n), out_dtype if whole else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{weight}_matmul",
    )(*operands)
    if whole:
        return partial[0]
    return finish_sums(
        partial, out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
