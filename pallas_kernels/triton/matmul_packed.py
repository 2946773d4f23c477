"""y = residual + activation(x @ w + bias) with packed weights: int2 to int6, e2m1 (MXFP4, NVFP4), NF4, FP4.

    y[m, n] = sum_k x[m, k] * value(code[n, k]) * scale[n, k // g]
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, K]
    packed     uint32 [N, B, 4 * bits], B = ceil(K / 128): the packed order
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128; or [1, 1]
    zero_point int8 or float, like scale; bias [N]; residual [M, N]; global_scale float32 [] or [N]

Work: a program owns `tile_n` rows of the weight and `tile_m` of x, and a share of the blocks of 128 (`split_k`). For
one block:

    words [tile_n, 4 * bits] --registers (`operand`)--> values [tile_n, 128] --dot--> += x [tile_m, 128]

The weight is the operand that stays in registers: words come through asynchronous copies into shared memory, each
thread reads those that hold its own values, and no value ever changes its thread. x comes as it is. With `split_k` > 1
partial sums go out in float32, and one XLA fusion adds them and finishes.

Scales of 128 columns or more multiply the block's float32 sum. Smaller groups are products of their own, a piece of the
block each, and so are their sums; e8m0 and e4m3 scales times e2m1 are exact in bfloat16 and multiply the values
instead. With a row or two of x there is room in the 8 columns that the tensor cores have anyway: each row fills one for
each group of a block, zero outside of it, and one product gives a sum for each group.

Zero points of integers are integers: `code - zero` is exact, and the values are that. Others add (middle - z) * sum(x)
to the sum of their group; the sums of x are a product with ones on the tensor cores, which are idle while memory is the
limit; with more rows of x they are made beforehand.

Numerics: products of codes and x are exact in the tensor cores, sums float32, one rounding, of the result. Exception:
NF4 and FP4 values are rounded to x's type.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.pairs import TABLES
from pallas_kernels.result import result
from pallas_kernels.triton import columns, edges
from pallas_kernels.triton.operand import BLOCK, PLANES, operand_pieces, plane_words
from pallas_kernels.triton.thread_products import add_scaled
from pallas_kernels.triton.tiles import Tile, packed_tile, smem_of

_FEW_ROWS = 16
_COLUMNS = 8  # of the tensor cores' result, at least
_EXACT_FACTORS = ("float8_e8m0fnu", "float8_e4m3fn")


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    return why_not(k, n, **facts)


def _tallest(bits: int, group: int, cc: int, sums: bool = False, shifts_values: bool = False) -> int:
    """Rows of x that a program can have. Blackwell keeps sums of a block's groups in a memory of 512 columns; before
    Hopper's tensor cores registers are too few for sums of x besides, on Hopper for zero points of groups of 16 and
    for groups of 16 and 32 whose codes are not of four bits."""
    if cc >= 100:
        return 256 // max(1, BLOCK // group)
    if cc < 90:
        return 32 if sums else 256
    return 64 if group == 16 and shifts_values or group < 64 and bits != 4 else 256


def configs(
    m: int, k: int, n: int, *, bits: int, group: int, smem: int, sms: int, cc: int, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose shared memory fits, and that fill the chip without slivers."""
    blocks = -(-k // BLOCK)
    tallest = min(64, max(_COLUMNS, 1 << (m - 1).bit_length()))
    shapes = [(32, 2), (64, 2), (64, 4), (128, 4), (128, 8)]
    found = []
    for tile_m in [tallest] + [128, 256] * (m > 64):
        for tile_n, warps in shapes + [(256, 8)] * (m > 16):
            for split_k in (1, 2, 4, 8):
                programs = -(-n // tile_n) * -(-m // tile_m) * split_k
                slivers = split_k > 1 and (blocks // split_k < 2 or programs > 16 * sms)
                # sums of 128 registers a thread; 64 where x takes registers too
                most = (128 if cc == 90 else 64) * 32 * warps
                if slivers or tile_m > _tallest(bits, group, cc) or tile_m * tile_n > most:
                    continue
                tiles = [Tile(tile_m, tile_n, split_k, warps, stages) for stages in (2, 3, 4)]
                found += [dataclasses.asdict(tile) for tile in tiles if smem_of(tile, bits) <= smem]
    return found


def _sums_of_pieces(x: jax.Array, pieces: int) -> jax.Array:
    """Sums of x `[M, K]` over each of the pieces of its blocks: float32 `[pieces, M]`."""
    pieces_of_x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % BLOCK)))
    return pieces_of_x.reshape(x.shape[0], pieces, -1).sum(axis=2).T


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    m: int
    n: int
    k: int
    weight: str
    bits: int
    group: int  # elements that share a scale; all of K, rounded up, where a row has one
    scale: str  # dtype of the scales
    zero_point: str | None  # dtype of the zero points
    one_row: bool  # one scale for all rows
    one_column: bool  # one scale a row, for all of K
    tile: Tile
    interpret: bool

    @property
    def per_block(self) -> int:
        """Groups in a block of 128."""
        return max(1, BLOCK // self.group)

    @property
    def rows_of_x(self) -> int:
        """Columns of the product that one row of x fills: one for each group of a block, where there is room."""
        spread = self.m * self.per_block <= _COLUMNS and self.zero_point is None and not self.has_bits
        return self.per_block if spread else 1

    @property
    def has_bits(self) -> bool:
        """Whether a plane has one bit a code."""
        return PLANES[self.bits][-1] == 1

    @property
    def scales_values(self) -> bool:
        """Whether scales multiply the values."""
        exact = self.weight == "e2m1" and self.scale in _EXACT_FACTORS
        return exact and self.per_block > self.rows_of_x

    @property
    def shifts_values(self) -> bool:
        """Whether zero points are subtracted from the codes."""
        return self.zero_point == "int8" and self.weight not in TABLES

    @property
    def sums(self) -> bool:
        """Whether zero points need sums of x."""
        return self.zero_point is not None and not self.shifts_values

    @property
    def sums_given(self) -> bool:
        """Whether they are made beforehand."""
        return self.sums and self.m > _FEW_ROWS

    @property
    def pieces(self) -> int:
        """Products that a block is cut into. Where a row's numbers or a plane of one bit make values, four at least:
        with fewer Triton moves the values to other threads (seen in the machine code)."""
        mixed = self.shifts_values or self.scales_values or self.has_bits
        return max(self.per_block // self.rows_of_x, 4 if mixed else 1)


def _words(plan: _Plan, ref: Any, first_row: jax.Array, block: jax.Array) -> list[jax.Array]:
    """A block's planes. evict_first: read once, they would push x and scales out of the L2."""
    height, policy = plan.tile.tile_n, "evict_first" if plan.m <= plan.tile.tile_m else None
    return [
        edges.load(ref, (first_row, block * 4 * plan.bits + first), (height, size), (height, 1), policy)
        for first, size in plane_words(plan.bits)
    ]


def _rows_of_x(plan: _Plan, ref: Any, first: jax.Array, block: jax.Array, piece: int) -> jax.Array:
    """x of one piece of a block, `[tile_m, 128 / pieces]`."""
    width, height = BLOCK // plan.pieces, plan.tile.tile_m
    start = block * BLOCK + piece * width
    if plan.rows_of_x == 1:
        return edges.load(ref, (first, start), (height, width), (height, BLOCK))
    shape = (height, BLOCK)
    row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    groups, group = jnp.int32(plan.rows_of_x), jnp.int32(plan.group)
    mask = jax.lax.div(column, group) == jax.lax.rem(row, groups)
    mask = mask & (row < plan.m * plan.rows_of_x)
    if plan.k % BLOCK:
        mask = mask & (start + column < plan.k)
    return plgpu.load(ref.at[jax.lax.div(row, groups), start + column], mask=mask, other=jnp.zeros((), ref.dtype))


def _kernel(plan: _Plan, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, z_ref, sums_ref, out_ref = plan.tile, refs[0], refs[-2:][0], refs[-1]
    first_x, first_row = pl.program_id(0) * tile.tile_m, pl.program_id(1) * tile.tile_n
    rows = jnp.minimum(first_row + jnp.arange(tile.tile_n), plan.n - 1)
    rows = jnp.zeros_like(rows) if plan.one_row else rows

    def of_pieces(ref: Any, dtype: str, block: jax.Array) -> list[jax.Array]:
        """Scales or zero points of a block's pieces."""
        if plan.rows_of_x > 1:
            inside = jax.lax.broadcasted_iota(jnp.int32, (1, tile.tile_m), 1) % plan.rows_of_x
            return [columns.read(ref, dtype, rows, block, plan.group, inside)]
        groups = [i * plan.per_block // plan.pieces for i in range(plan.pieces)]
        return [columns.read(ref, dtype, rows, block, plan.group, group) for group in groups]

    def sums_of(x: jax.Array, block: jax.Array, piece: int) -> jax.Array:
        """Sums of the rows of x over a piece."""
        if not plan.sums_given:
            return plgpu.dot(jnp.ones((tile.tile_n, x.shape[1]), x.dtype), x.T)
        return edges.load(sums_ref, (block * plan.pieces + piece, first_x), (1, tile.tile_m))

    def step(block: jax.Array, total: jax.Array) -> jax.Array:
        # Scales first: nothing prefetches them, so that their way from memory is to overlap with the product.
        scales = None if plan.one_column else of_pieces(s_ref, plan.scale, block)
        zeros = None if plan.zero_point is None else of_pieces(z_ref, plan.zero_point, block)
        pieces = operand_pieces(
            _words(plan, w_ref, first_row, block), plan.weight, plan.bits, x_ref.dtype.name, plan.pieces,
            scales if plan.scales_values else None, zeros if plan.shifts_values else None, plan.interpret,
        )  # fmt: skip
        sums = []
        for piece, values in enumerate(pieces):
            x = _rows_of_x(plan, x_ref, first_x, block, piece)
            part = plgpu.dot(values, x.T)
            if plan.sums:
                assert zeros is not None
                middle = 0.0 if plan.weight in TABLES else 2.0 ** (plan.bits - 1)
                part = part + (middle - zeros[piece]) * sums_of(x, block, piece)
            sums.append(part)
        if scales is None or plan.scales_values:
            return functools.reduce(jnp.add, sums, total)
        share = plan.pieces * plan.rows_of_x // plan.per_block  # pieces of a group
        for first in range(0, plan.pieces, share):
            part = functools.reduce(jnp.add, sums[first : first + share])
            total = add_scaled(total, part, scales[first], plan.interpret)
        return total

    blocks = -(-plan.k // BLOCK)
    share = -(-blocks // tile.split_k)
    start = pl.program_id(2) * share
    zeros = jnp.zeros((tile.tile_n, tile.tile_m), jnp.float32)
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, blocks), step, zeros)
    if plan.one_column:
        total = total * columns.read(s_ref, plan.scale, rows, jnp.int32(0), plan.group, 0)
    height = tile.tile_m // plan.rows_of_x
    if plan.rows_of_x > 1:
        total = total.reshape(tile.tile_n, height, plan.rows_of_x).sum(axis=2)
    first = pl.program_id(0) * height
    out = out_ref.at[pl.program_id(2), pl.ds(first, height), pl.ds(first_row, tile.tile_n)]
    inside = edges.inside((height, tile.tile_n), (first, first_row), (plan.m, plan.n))
    plgpu.store(out, total.T.astype(out_ref.dtype), mask=inside)


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
    smem: int = 99 * 1024,
    cc: int = 90,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: "int2" .. "int6", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Tile`; empty takes `packed_tile` for the shape.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have; cc: compute capability.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, k), (n, blocks) = x.shape, packed.shape[:2]
    plan = _Plan(
        m, n, k, weight, packed.shape[2] // 4, group if scale.shape[1] > 1 else blocks * BLOCK, scale.dtype.name,
        None if zero_point is None else zero_point.dtype.name, scale.shape[0] == 1 < n, scale.shape[1] == 1,
        Tile(0, 0, 0, 0, 0), interpret,
    )  # fmt: skip
    tallest = _tallest(plan.bits, group, cc, plan.sums, plan.shifts_values)
    tile = Tile(**config) if config else packed_tile(m, n, blocks, plan.bits, tallest, sms, smem, cc)
    plan = dataclasses.replace(plan, tile=tile)
    whole = tile.split_k == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    operands = [x, packed.reshape(n, -1), columns.as_words(scale)]
    operands += [] if zero_point is None else [columns.as_words(zero_point)]
    operands += [_sums_of_pieces(x, blocks * plan.pieces)] if plan.sums_given else []
    partial = pl.pallas_call(
        functools.partial(_kernel, plan),
        # neighbours share their rows of the weight, which come from memory once; x is small and stays in the L2
        grid=(-(-m * plan.rows_of_x // tile.tile_m), -(-n // tile.tile_n), tile.split_k),
        out_shape=result((tile.split_k, m, n), out_dtype if whole else jnp.float32, *operands),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{weight}_matmul",
    )(*operands)
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
