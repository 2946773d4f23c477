"""y = x @ w.T with the packed weights that `matmul_packed` multiplies by: the gradient with respect to its x.

    y[m, k] = sum_n x[m, n] * scale[n, k // g] * value(code[n, k])
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, N]
    packed     uint32 [N, B, 4 * bits], B = ceil(K / 128): the packed order
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128; or [1, 1]
    zero_point int8 or float, like scale; bias [K]; residual [M, K]; global_scale float32 [] or [N]

Work: a program owns one or two neighbouring `blocks` of 128 k, `tile_m` rows of x, and a share of the rows of the
weight (`split_n`), `tile_n` of them a step:

    words [tile_n, 4 * bits] --registers (`operand`)--> values [tile_n, 128] --dot--> x [tile_m, tile_n] @ values

The sum runs over n, so that pairs of values in a register are neighbours along the wrong axis for the tensor cores:
values go through shared memory, once, and x comes as it is. Rows of the weight have scales of their own, which thus
cannot wait for the sums: they multiply the values, two an instruction. With `split_n` > 1 partial sums go out in
float32, and one XLA fusion adds them and finishes.

Numerics: the values are those of the weight dequantized to x's type: scales are rounded to it (bfloat16, e8m0 and e4m3
scales are exact in bfloat16), then each product with a code, unless it is exact, as those of e2m1 with e8m0 or e4m3
are. Sums are float32. Integers with float16 scales: about sqrt(3) times the error of rounding the exact result, with
bfloat16 scales sqrt(2) times. NF4 and FP4 values are rounded as well, and codes less float zero points: up to twice.
In float16, products below 2^-14 lose bits.
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
from pallas_kernels.triton import columns
from pallas_kernels.triton.operand import BLOCK, PLANES, operand, operand_pieces, plane_words


@dataclasses.dataclass(frozen=True)
class Tile:
    """A configuration.

    Attributes:
      tile_m: rows of x a program computes.
      tile_n: rows of the weight a step.
      split_n: programs that share one output tile, each with a part of the weight's rows.
      warps: of a program.
      stages: tiles in flight from memory to shared memory.
      blocks: of 128 columns of the weight that a program computes, 1 or 2.
    """

    tile_m: int
    tile_n: int
    split_n: int
    warps: int
    stages: int
    blocks: int = 1


def unsupported(
    m: int, k: int, n: int, *, weight: str, group: int, block_n: int, x_dtype: str, x_format: str | None,
    scale_dtype: str, transposed: bool, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if not transposed:
        return "it multiplies by the weight's transpose, as gradients do"
    if x_format is not None or x_dtype not in ("bfloat16", "float16"):
        return f"it takes x in bfloat16 or float16, not in {x_format or x_dtype}"
    if block_n not in (1, n) or (block_n == n != 1 and group < k):
        return f"its scales belong to one row or to all, not to {block_n} rows"
    if group < k and group not in (16, 32, 64) and group % BLOCK:
        return f"groups of {group}: it knows 16, 32, 64 and multiples of 128"
    if x_dtype == "float16" and scale_dtype == "float8_e8m0fnu":
        return "e8m0 scales exceed the range of float16"
    return None


_SHORTEST_SHARE = 4  # steps that are worth a program
# (tile_n, warps, blocks) of a program; 128 bytes of words a row, instead of 64, with two blocks
_PROGRAMS = ((32, 2, 1), (32, 4, 1), (64, 4, 1), (64, 8, 1), (64, 8, 2))


def configs(
    m: int, k: int, n: int, *, bits: int, group: int, smem: int, sms: int, cc: int, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose shared memory fits, and that fill the chip without slivers."""
    found: dict[Tile, None] = {}  # a set in order
    tallest = min(64, max(16, 1 << (m - 1).bit_length()))
    most_sums = 128 if cc == 90 else 64  # of a thread: more, with the values in flight, spill
    for tile_m in [tallest] + [128] * (m > 64):
        for tile_n, warps, blocks in _PROGRAMS:
            if not _divides(blocks, -(-k // BLOCK), group, k) or tile_m * blocks * BLOCK > most_sums * 32 * warps:
                continue
            tiles = -(-m // tile_m) * -(-k // (blocks * BLOCK))
            for per_sm in (1, 2, 4, 8):
                split_n = max(1, per_sm * sms // tiles)
                if split_n > 1 and (per_sm * warps > 32 or split_n * _SHORTEST_SHARE * tile_n > n):
                    continue
                for stages in (3, 4):
                    if _shared_bytes(tile_m, tile_n, blocks, stages, bits) <= smem:
                        found[Tile(tile_m, tile_n, split_n, warps, stages, blocks)] = None
    return [dataclasses.asdict(tile) for tile in found]


def _divides(blocks: int, of: int, group: int, k: int) -> bool:
    """Whether programs may own `blocks` blocks of `of`: none is alone, and no two of them straddle groups."""
    return of % blocks == 0 and (group <= BLOCK or group >= k or group % (blocks * BLOCK) == 0)


def _shared_bytes(tile_m: int, tile_n: int, blocks: int, stages: int, bits: int) -> int:
    """Shared memory of a program: words and x in flight, and the values of a step."""
    return tile_n * (stages * (blocks * 16 * bits + 2 * tile_m + 16) + blocks * 2 * BLOCK)


# (most rows of x, tile_m, tile_n, warps, stages, blocks, programs a multiprocessor)
_SHAPES = (
    (16, 16, 64, 4, 3, 1, 6),
    (32, 32, 64, 4, 3, 1, 4),
    (64, 64, 64, 4, 3, 1, 2),
    (None, 128, 64, 8, 3, 1, 2),
)


def tile_for(m: int, n: int, blocks: int, sms: int) -> Tile:
    """A first choice, before any tuning."""
    _, tile_m, tile_n, warps, stages, wide, per_sm = next(row for row in _SHAPES if row[0] is None or m <= row[0])
    tiles = -(-m // tile_m) * -(-blocks // wide)
    split_n = max(1, min(per_sm * sms // tiles, n // (_SHORTEST_SHARE * tile_n)))
    return Tile(tile_m, tile_n, split_n, warps, stages, wide)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    m: int
    n: int
    blocks: int  # of the weight
    weight: str
    bits: int
    group: int  # elements that share a scale; all of K, rounded up, where a row has one
    scale: str | None  # dtype of the scales; None where there is one for all, left to the finish
    zero_point: str | None  # dtype of the zero points
    one_row: bool  # one zero point for all rows
    tile: Tile
    interpret: bool

    @property
    def per_block(self) -> int:
        """Groups in a block of 128."""
        return max(1, BLOCK // self.group)


def _load(ref: Any, first: tuple[Any, ...], shape: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
    """A tile of an array of `size`, zeros past its edges."""
    inside = [
        first[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size[axis]
        for axis in range(len(shape))
        if size[axis] % shape[axis]
    ]
    mask = functools.reduce(jnp.logical_and, inside) if inside else None
    at = ref.at[tuple(pl.ds(*pair) for pair in zip(first, shape, strict=True))]
    return plgpu.load(at, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def _entries(plan: _Plan, ref: Any, dtype: str, rows: jax.Array, column: jax.Array, group: jax.Array) -> jax.Array:
    """Scales or zero points of a step.

    Args:
      rows: `[R]`, rows of the weight.
      column: of programs, each `blocks` blocks wide.
      group: int32 `[R, C]`, for each of C results the group inside the program's blocks.

    Returns:
      float32 `[R, C]`, or `[R, 1]` where the program's blocks are in one group.
    """
    rows = jnp.zeros_like(rows) if plan.one_row else rows
    share = plan.group // plan.tile.blocks  # `columns` counts by blocks of 128, each a program's share of the columns
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


def _values(
    plan: _Plan, step: jax.Array, column: jax.Array, w_ref: Any, s_ref: Any, z_ref: Any, dtype: str
) -> jax.Array:
    """The weight of one step and column of programs in `dtype`, `[tile_n, blocks * 128]`."""
    tile, height = plan.tile, plan.tile.tile_n * plan.tile.blocks  # a row for each block
    first = step * tile.tile_n
    row = jnp.arange(height)
    rows = jnp.minimum(first + row // tile.blocks, plan.n - 1)
    first_group = (row % tile.blocks * plan.per_block)[:, None]

    def of_values(ref: Any, name: str) -> jax.Array:
        inside = jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) // plan.group
        return _entries(plan, ref, name, rows, column, first_group + (inside if plan.per_block > 1 else 0))

    def of_words() -> list[jax.Array]:
        """Scales for the words at each shift, t_low."""
        wide = PLANES[plan.bits][0]
        shifts = 16 // wide
        high = jax.lax.broadcasted_iota(jnp.int32, (1, 4 * wide), 1) % wide
        groups = [first_group + (high * shifts + low) * 8 // plan.group for low in range(shifts)]
        return [_entries(plan, s_ref, plan.scale or "", rows, column, group) for group in groups]

    planes = [
        _load(
            w_ref, (first, column * tile.blocks, word), (tile.tile_n, tile.blocks, words),
            (plan.n, plan.blocks, word + words),
        ).reshape(height, words)
        for word, words in plane_words(plan.bits)
    ]  # fmt: skip
    read = functools.partial(operand, planes, plan.weight, plan.bits, dtype, interpret=plan.interpret)
    if z_ref is None:
        values = read(None if plan.scale is None else of_words())
    elif plan.per_block == 1 and plan.zero_point == "int8":
        scales = None if plan.scale is None else [of_values(s_ref, plan.scale)]
        zeros = [of_values(z_ref, plan.zero_point)]
        (values,) = operand_pieces(planes, plan.weight, plan.bits, dtype, 1, scales, zeros, plan.interpret)
    else:
        shift = 2.0 ** (plan.bits - 1) - of_values(z_ref, plan.zero_point or "")
        scale = jnp.ones((1, 1)) if plan.scale is None else of_values(s_ref, plan.scale)
        values = _shifted_and_scaled(read(), shift, scale, plan.interpret)
    return values.reshape(tile.tile_n, tile.blocks * BLOCK)


def _kernel(plan: _Plan, x_ref: Any, w_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, out_ref = plan.tile, refs[-1]
    rest = iter(refs[:-1])
    s_ref = None if plan.scale is None else next(rest)
    z_ref = None if plan.zero_point is None else next(rest)
    first_x, column = pl.program_id(0) * tile.tile_m, pl.program_id(1)
    shape = (tile.tile_m, tile.blocks * BLOCK)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        values = _values(plan, i, column, w_ref, s_ref, z_ref, x_ref.dtype.name)
        x = _load(x_ref, (first_x, i * tile.tile_n), (tile.tile_m, tile.tile_n), (plan.m, plan.n))
        return total + plgpu.dot(x, values)

    steps, first_k = -(-plan.n // tile.tile_n), column * tile.blocks * BLOCK
    share = -(-steps // tile.split_n)
    start = pl.program_id(2) * share
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), step, jnp.zeros(shape, jnp.float32))
    live = first_x + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.m
    live &= first_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < plan.blocks * BLOCK
    out = out_ref.at[pl.program_id(2), pl.ds(first_x, shape[0]), pl.ds(first_k, shape[1])]
    plgpu.store(out, total.astype(out_ref.dtype), mask=live)


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
      weight: "int2" .. "int6", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Tile`; empty takes `tile_for` the shape and `sms` multiprocessors.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, K]` in `out_dtype`, default x's; K as stored, padding included.
    """
    (m, n), blocks = x.shape, packed.shape[1]
    if global_scale is not None and global_scale.ndim == 1:  # of rows of the weight, over which the sum runs
        scale, global_scale = scale.astype(jnp.float32) * global_scale[:, None], None
    if scale.size == 1:
        global_scale = scale.reshape(()).astype(jnp.float32) * (1.0 if global_scale is None else global_scale)
    tile = Tile(**config) if config else tile_for(m, n, blocks, sms)
    plan = _Plan(
        m, n, blocks, weight, packed.shape[2] // 4, group if scale.shape[1] > 1 else 2 * blocks * BLOCK,
        None if scale.size == 1 else scale.dtype.name, None if zero_point is None else zero_point.dtype.name,
        scale.shape[0] == 1, tile, interpret,
    )  # fmt: skip
    assert plan.group <= BLOCK or plan.group % (tile.blocks * BLOCK) == 0, (plan.group, tile)
    whole = tile.split_n == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    entries = ([] if plan.scale is None else [scale]) + ([] if zero_point is None else [zero_point])
    partial = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(-(-m // tile.tile_m), -(-blocks // tile.blocks), tile.split_n),
        out_shape=jax.ShapeDtypeStruct((tile.split_n, m, blocks * BLOCK), out_dtype if whole else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{weight}_transposed",
    )(x, packed, *(columns.as_words(a) for a in entries))
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
