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
from pallas_kernels.grouped import why_not
from pallas_kernels.result import result
from pallas_kernels.triton import edges, weight_tile
from pallas_kernels.triton.operand import BLOCK
from pallas_kernels.triton.weight_tile import Weight


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


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if not transposed:
        return "it multiplies by the weight's transpose, as gradients do"
    return why_not(k, n, **facts)


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
    """Static facts of one call: rows of x, the weight, the configuration."""

    m: int
    weight: Weight
    tile: Tile


def _kernel(plan: _Plan, x_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, weight, out_ref = plan.tile, plan.weight, refs[-1]
    parts = weight.refs(refs)
    first_x, column = pl.program_id(0) * tile.tile_m, pl.program_id(1)
    shape = (tile.tile_m, tile.blocks * BLOCK)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        values = weight_tile.values(weight, parts, i, column, (tile.tile_n, tile.blocks), x_ref.dtype.name)
        x = edges.load(x_ref, (first_x, i * tile.tile_n), (tile.tile_m, tile.tile_n))
        return total + plgpu.dot(x, values)

    steps, first_k = -(-weight.n // tile.tile_n), column * tile.blocks * BLOCK
    share = -(-steps // tile.split_n)
    start = pl.program_id(2) * share
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), step, jnp.zeros(shape, jnp.float32))
    live = first_x + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.m
    live &= first_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < weight.blocks * BLOCK
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
    of = weight_tile.describe(packed, scale, zero_point, weight, group, interpret)
    assert of.group <= BLOCK or of.group % (tile.blocks * BLOCK) == 0, (of.group, tile)
    whole = tile.split_n == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    partial = pl.pallas_call(
        functools.partial(_kernel, _Plan(m, of, tile)),
        grid=(-(-m // tile.tile_m), -(-blocks // tile.blocks), tile.split_n),
        out_shape=result((tile.split_n, m, blocks * BLOCK), out_dtype if whole else jnp.float32, x, packed, scale),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{weight}_transposed",
    )(x, *weight_tile.operands(of, packed, scale, zero_point))
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
