"""y = x @ w.T with the weights of eight bits that `matmul_8bit` multiplies by: the gradient with respect to its x.

    y[m, k] = sum_n x[m, n] * scale[n // block_n, k // g] * (code[n, k] - zero_point[n // block_n, k // g])

Operands
    x          bfloat16 [M, N]
    codes      int8, float8_e4m3fn or float8_e5m2 [N, K], natural order
    scale      float16, bfloat16 or float32 [ceil(N / block_n), ceil(K / g)]: one a row, group of 128, 128 x 128 block
    zero_point int8 like scale

Work: a program owns `tile_m` rows of x, 128 columns of the weight, and a share of its rows (`split_n`), `tile_n` of
them a step. The sum runs over n, along which scales change, so that they multiply x: by the tile of it, in float32.

Numerics: x * scale is rounded to x's type, products with codes are exact, sums float32: about sqrt(2) times the error
of rounding the exact result.
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
from pallas_kernels.result import result
from pallas_kernels.triton import edges
from pallas_kernels.triton.transposed import Tile

TILE_K = 128


def unsupported(
    m: int, k: int, n: int, *, weight: str, group: int, block_n: int, x_dtype: str, x_format: str | None,
    scale_dtype: str, transposed: bool, features: frozenset[str], cc: int, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if not transposed:
        return "it multiplies by the weight's transpose, as gradients do"
    if m == 0:
        return "there are no rows of x"
    if x_format is not None or x_dtype != "bfloat16":
        return f"it takes x in bfloat16, not in {x_format or x_dtype}"
    if scale_dtype not in ("float16", "bfloat16", "float32"):
        return f"it takes scales in float16, bfloat16 or float32, not in {scale_dtype}"
    if weight != "int8" and cc < 89:
        return "Triton converts FP8 from compute capability 8.9 on"
    if group < k and group % TILE_K:
        return f"groups of {group}: it knows multiples of {TILE_K}"
    if features - {"zero_point", "global_scale", "nested_scale"}:
        return f"it does not know {', '.join(sorted(features))}"
    return None


def configs(m: int, k: int, n: int, *, smem: int, sms: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose shared memory fits, and that fill the chip without slivers."""
    found = []
    for tile_m, warps in ((16, 4), (32, 4), (64, 4), (128, 8)):
        if tile_m > max(16, 2 * m):
            continue
        for tile_n in (32, 64):
            for per_sm in (2, 4):
                split_n = -(-per_sm * sms // (-(-k // TILE_K) * -(-m // tile_m)))
                if split_n > 1 and split_n * tile_n > n:
                    continue
                for stages in (3, 4):
                    if stages * tile_n * (TILE_K + 2 * tile_m) <= smem:
                        found.append(dataclasses.asdict(Tile(tile_m, tile_n, split_n, warps, stages)))
    return found


def tile_for(m: int, n: int, k: int, sms: int) -> Tile:
    """A first choice, before any tuning."""
    tile_m = min(64, max(16, 1 << (m - 1).bit_length()))
    tile_n, tiles = 64, -(-k // TILE_K) * -(-m // tile_m)
    split_n = max(1, min(-(-4 * sms // tiles), n // (4 * tile_n)))
    return Tile(tile_m, tile_n, split_n, 4, 4)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    m: int
    n: int
    k: int
    group: int
    block_n: int
    rows: int  # of scales
    columns: int  # of scales
    zero_point: bool
    tile: Tile


def _kernel(plan: _Plan, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, z_ref, out_ref = plan.tile, (refs[0] if plan.zero_point else None), refs[-1]
    first_x, first_k = pl.program_id(0) * tile.tile_m, pl.program_id(1) * TILE_K
    group = jnp.minimum(first_k // plan.group, plan.columns - 1)
    steps = -(-plan.n // tile.tile_n)
    share = -(-steps // tile.split_n)

    def of_rows(ref: Any, first: jax.Array) -> jax.Array:
        """`ref[rows // block_n, group]` of a step's rows, in float32."""
        row = jnp.minimum((first + jnp.arange(tile.tile_n)) // plan.block_n, plan.rows - 1)
        return plgpu.load(ref.at[row, jnp.broadcast_to(group, row.shape)]).astype(jnp.float32)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        first = i * tile.tile_n
        values = edges.load(w_ref, (first, first_k), (tile.tile_n, TILE_K))
        x = edges.load(x_ref, (first_x, first), (tile.tile_m, tile.tile_n))
        if z_ref is not None:  # past N's edge x is zero, whatever the value
            values = values.astype(jnp.float32) - of_rows(z_ref, first)[:, None]
        scaled = (x.astype(jnp.float32) * of_rows(s_ref, first)[None, :]).astype(x.dtype)
        # by way of float32: from 8-bit floats to bfloat16 the compiler would go through the slow conversion unit
        return total + plgpu.dot(scaled, values.astype(jnp.float32).astype(x.dtype))

    start = pl.program_id(2) * share
    zero = jnp.zeros((tile.tile_m, TILE_K), jnp.float32)
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), step, zero)
    shape = (tile.tile_m, TILE_K)
    live = (first_x + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.m) & (
        first_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < plan.k
    )
    out = out_ref.at[pl.program_id(2), pl.ds(first_x, tile.tile_m), pl.ds(first_k, TILE_K)]
    plgpu.store(out, total, mask=live)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    block_n: int = 1,
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
      group: elements of K that share a scale; K or more for one scale a row.
      block_n: rows that share a scale; N for one in all.
      global_scale: float32 `[]`; bias: `[K]`; residual: `[M, K]`.
      config: fields of `Tile`; empty takes `tile_for` the shape and `sms` multiprocessors.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, K]` in `out_dtype`, default x's.
    """
    (m, n), k = x.shape, codes.shape[1]
    tile = Tile(**config) if config else tile_for(m, n, k, sms)
    rows, columns = scale.shape
    plan = _Plan(m, n, k, min(group, k), block_n, rows, columns, zero_point is not None, tile)
    partial = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(-(-m // tile.tile_m), -(-k // TILE_K), tile.split_n),
        out_shape=result((tile.split_n, m, k), jnp.float32, x, codes, scale),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{codes.dtype.name}_transposed",
    )(x, codes, scale, *([] if zero_point is None else [zero_point]))
    return finish(
        partial.sum(axis=0),
        jnp.dtype(out_dtype or x.dtype),
        global_scale=global_scale,
        bias=bias,
        activation=activation,
        residual=residual,
    )
