"""y = residual + activation(x @ w + bias) with packed weights and many rows of x.

    y[m, n] = sum_k x[m, k] * scale[n, k // g] * value(code[n, k])
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, K]
    packed     uint32 [N, B, 4 * bits], B = ceil(K / 128): the packed order
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128; or [1, 1]
    zero_point int8 or float, like scale; bias [N]; residual [M, N]; global_scale float32 [] or [N]

Work: a program owns `tile_m` rows of x, `tile_n` rows of the weight, and a share of the blocks of 128 (`split_k`). For
one block:

    words [tile_n, 4 * bits] --registers (`weight_tile`)--> values [tile_n, 128] --shared memory--> x @ values.T

`matmul_packed` holds the weight in registers as the tensor cores' first operand, and its sums besides until a scale
meets them; here x comes first, sums stay where they are, and values go through shared memory once, for all warps. A
program waits for its product before it decodes again, so that two programs a multiprocessor are to take turns: the
product of a block is two of 64 columns, which as one would take ptxas 168 registers a thread instead of 128.

Numerics: values are those of the weight dequantized to x's type (`weight_tile`), sums float32, one rounding of the
result: about sqrt(3) times the error of rounding the exact result for integers with float16 scales.
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
from pallas_kernels.triton.tiles import Tile
from pallas_kernels.triton.weight_tile import Weight

_HALF = BLOCK // 2  # columns of a product
_SHORTEST_SHARE = 4  # blocks that are worth a program
# (tile_m, tile_n, warps): 16 rows of the weight a warp, that values may leave registers by STSM
_SHAPES = ((64, 64, 4), (128, 64, 4), (128, 128, 8), (256, 128, 8))


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    return why_not(k, n, **facts)


def smem_of(tile: Tile, bits: int) -> int:
    """Shared memory of a program, in bytes: blocks of words and of 16-bit x in flight, and the values of one."""
    return tile.stages * (tile.tile_n * 16 * bits + tile.tile_m * 2 * BLOCK) + tile.tile_n * 2 * BLOCK


def configs(m: int, k: int, n: int, *, bits: int, smem: int, sms: int, cc: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose memory and sums fit, and that fill the chip without slivers."""
    found = []
    for tile_m, tile_n, warps in _SHAPES:
        if tile_m >= 2 * m or tile_m * tile_n > _most_sums(cc) * 32 * warps:
            continue
        for split_k in (1, 2, 4):
            programs = -(-n // tile_n) * -(-m // tile_m) * split_k
            if split_k > 1 and (programs > 4 * sms or -(-k // BLOCK) // split_k < _SHORTEST_SHARE):
                continue
            tiles = [Tile(tile_m, tile_n, split_k, warps, stages) for stages in (2, 3, 4)]
            found += [dataclasses.asdict(tile) for tile in tiles if smem_of(tile, bits) <= smem]
    return found


def _most_sums(cc: int) -> int:
    """Sums of a thread: Hopper's tensor cores read both operands from shared memory, elsewhere they take registers."""
    return 128 if cc == 90 else 64


def tile_for(m: int, n: int, blocks: int, sms: int, cc: int) -> Tile:
    """A first choice, before any tuning."""
    tile_m, tile_n, warps = (128, 128, 8) if cc == 90 and m > 64 else (64, 64, 4)
    programs = -(-n // tile_n) * -(-m // tile_m)
    split_k = 1
    while split_k < 4 and split_k * programs < sms and blocks // (2 * split_k) >= _SHORTEST_SHARE:
        split_k *= 2
    return Tile(tile_m, tile_n, split_k, warps, 2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call: rows and columns of x, the weight, the configuration."""

    m: int
    k: int
    weight: Weight
    tile: Tile


def _kernel(plan: _Plan, x_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, weight, out_ref = plan.tile, plan.weight, refs[-1]
    parts = weight.refs(refs)
    first_x, row = pl.program_id(0) * tile.tile_m, pl.program_id(1)
    shape = (tile.tile_m, tile.tile_n)

    def step(block: jax.Array, total: jax.Array) -> jax.Array:
        values = weight_tile.values(weight, parts, row, block, (tile.tile_n, 1), x_ref.dtype.name)
        for i, half in enumerate(jax.lax.split(values, [_HALF, _HALF], axis=1)):
            at = (first_x, block * BLOCK + i * _HALF)
            x = edges.load(x_ref, at, (tile.tile_m, _HALF), (tile.tile_m, BLOCK))
            total = total + plgpu.dot(x, half.T)
        return total

    share = -(-weight.blocks // tile.split_k)
    start = pl.program_id(2) * share
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, weight.blocks), step, jnp.zeros(shape, jnp.float32))
    first = row * tile.tile_n
    live = first_x + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.m
    live &= first + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < weight.n
    out = out_ref.at[pl.program_id(2), pl.ds(first_x, shape[0]), pl.ds(first, shape[1])]
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
    cc: int = 90,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: "int2" .. "int6", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Tile`; empty takes `tile_for` the shape.
      sms: multiprocessors of the chip; cc: its compute capability.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, k), (n, blocks) = x.shape, packed.shape[:2]
    if scale.size == 1:
        one = scale.reshape(()).astype(jnp.float32)
        global_scale = one if global_scale is None else one * global_scale
    of = weight_tile.describe(packed, scale, zero_point, weight, group, interpret)
    tile = Tile(**config) if config else tile_for(m, n, blocks, sms, cc)
    whole = tile.split_k == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    partial = pl.pallas_call(
        functools.partial(_kernel, _Plan(m, k, of, tile)),
        # neighbours share their rows of the weight, which come from memory once
        grid=(-(-m // tile.tile_m), -(-n // tile.tile_n), tile.split_k),
        out_shape=result((tile.split_k, m, n), out_dtype if whole else jnp.float32, x, packed, scale),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{weight}_tall",
    )(x, *weight_tile.operands(of, packed, scale, zero_point))
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
