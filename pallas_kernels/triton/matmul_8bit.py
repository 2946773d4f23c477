"""y = residual + activation(x @ w + bias) with weights of eight bits: int8, e4m3, e5m2.

    y[m, n] = sum_k x[m, k] * (code[n, k] - zero_point[n, k // g]) * scale[n // block_n, k // g]

Operands
    x          bfloat16 or float16 [M, K]
    codes      int8, float8_e4m3fn or float8_e5m2 [N, K], natural order
    scale      float16, bfloat16, float32 or e8m0 [ceil(N / block_n), ceil(K / g)]: one a row, group or 128 x 128 block
    zero_point int8 like scale; bias [N]; residual [M, N]

Work: a program owns `tile_n` rows of the weight, `tile_m` of x and a share of K (`split_k`), 128 columns a step: codes
come through asynchronous copies, become values of x's type in registers (exact: e4m3 and e5m2 fit both types, int8 fits
bfloat16's 8 bits of significand) and meet x in the tensor cores. A group is one step or several; its scale multiplies
the step's float32 sum. e8m0 scales of 32 are powers of two and multiply the values, exactly.
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
from pallas_kernels.triton.tiles import Tile, tile_for

STEP = 128


def unsupported(
    m: int, k: int, n: int, *, group: int, block_n: int, x_dtype: str, x_format: str | None, scale_dtype: str,
    transposed: bool, weight: str, cc: int, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if x_format is not None or x_dtype not in ("bfloat16", "float16"):
        return f"it takes x in bfloat16 or float16, not in {x_format or x_dtype}"
    if weight == "e4m3" and cc < 89:
        return "Triton converts e4m3 from compute capability 8.9 on"
    if scale_dtype == "float8_e8m0fnu":
        return None if group == 32 and x_dtype == "bfloat16" else "e8m0 scales: it knows groups of 32 with bfloat16 x"
    if group < k and group % STEP:
        return f"groups of {group}: it knows multiples of {STEP}"
    return None


def configs(m: int, k: int, n: int, *, smem: int, sms: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring: those whose shared memory fits, and that fill the chip without slivers."""
    tile_m, found = min(64, max(16, 1 << (m - 1).bit_length())), []
    for tile_n, warps in ((64, 2), (64, 4), (128, 4), (128, 8)):
        for split_k in (1, 2, 4):
            programs = -(-n // tile_n) * -(-m // tile_m) * split_k
            if split_k > 1 and (k // STEP // split_k < 2 or programs > 16 * sms):
                continue
            for stages in (2, 3, 4):
                if stages * STEP * (tile_n + 2 * tile_m) <= smem:
                    found.append(dataclasses.asdict(Tile(tile_m, tile_n, split_k, warps, stages)))
    return found


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
    powers: bool  # scales are e8m0 bytes
    zero_point: bool
    tile: Tile

    @property
    def scale_last(self) -> bool:
        """Whether one scale a row can wait for the end."""
        return self.columns == 1 and not self.powers


def _kernel(plan: _Plan, x_ref: Any, w_ref: Any, s_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, z_ref, out_ref = plan.tile, (refs[0] if plan.zero_point else None), refs[-1]
    first_x, first_row = pl.program_id(0) * tile.tile_m, pl.program_id(1) * tile.tile_n
    policy = "evict_first" if plan.m <= tile.tile_m else None  # read once, codes would push x and scales out of the L2
    rows = jnp.minimum(first_row + jnp.arange(tile.tile_n), plan.n - 1)

    def at_groups(ref: Any, column: jax.Array) -> jax.Array:
        """`ref[rows // block_n, column]` for columns `[1, C]`: `[tile_n, C]`."""
        shape = (tile.tile_n, column.shape[1])
        row = jnp.minimum(rows // plan.block_n, plan.rows - 1)
        column = jnp.broadcast_to(jnp.minimum(column, plan.columns - 1), shape)
        return plgpu.load(ref.at[jnp.broadcast_to(row[:, None], shape), column])

    def column_of(step: jax.Array) -> jax.Array:
        return jnp.full((1, 1), step * STEP // plan.group)

    def powers_of(step: jax.Array) -> jax.Array:
        """e8m0 of each of a step's columns: byte b is 2^(b - 127), whose bfloat16 pattern is b << 7."""
        inside = jax.lax.broadcasted_iota(jnp.int32, (1, STEP), 1) // plan.group
        raw = at_groups(s_ref, step * (STEP // plan.group) + inside).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(raw << 23, jnp.float32).astype(x_ref.dtype)

    def one_step(step: jax.Array, total: jax.Array) -> jax.Array:
        first_k = step * STEP
        codes = edges.load(w_ref, (first_row, first_k), (tile.tile_n, STEP), policy=policy)
        x = edges.load(x_ref, (first_x, first_k), (tile.tile_m, STEP))
        if z_ref is not None:
            # past K's edge x is zero, whatever the value
            codes = codes.astype(jnp.float32) - at_groups(z_ref, column_of(step)).astype(jnp.float32)
        if codes.dtype == jnp.float8_e4m3fn:  # by itself Triton goes from float16 to bfloat16 by a slow instruction
            codes = codes.astype(jnp.float16).astype(jnp.float32)
        values = codes.astype(x.dtype)
        if plan.powers:
            return total + plgpu.dot(values * powers_of(step), x.T)
        part = plgpu.dot(values, x.T)
        return total + (part if plan.scale_last else part * at_groups(s_ref, column_of(step)).astype(jnp.float32))

    steps = -(-plan.k // STEP)
    share = -(-steps // tile.split_k)
    start = pl.program_id(2) * share
    zero = jnp.zeros((tile.tile_n, tile.tile_m), jnp.float32)
    total = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), one_step, zero)
    if plan.scale_last:
        total = total * at_groups(s_ref, jnp.zeros((1, 1), jnp.int32)).astype(jnp.float32)
    out = out_ref.at[pl.program_id(2), pl.ds(first_x, tile.tile_m), pl.ds(first_row, tile.tile_n)]
    shape = (tile.tile_m, tile.tile_n)
    inside = (first_x + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < plan.m) & (
        first_row + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < plan.n
    )
    plgpu.store(out, total.T.astype(out_ref.dtype), mask=inside)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    block_n: int = 1,
    zero_point: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    sms: int = 132,
    smem: int = 99 * 1024,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      group: elements of K that share a scale; K or more for one scale a row.
      block_n: rows that share a scale; N for one in all.
      config: fields of `Tile`; empty takes `tile_for` the shape.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, k), n = x.shape, codes.shape[0]
    tile = Tile(**config) if config else tile_for(m, n, -(-k // STEP), sms, smem)
    powers = scale.dtype == jnp.float8_e8m0fnu
    rows, columns = scale.shape
    plan = _Plan(m, n, k, min(group, k), block_n, rows, columns, powers, zero_point is not None, tile)
    whole = tile.split_k == 1 and bias is None and activation is None and residual is None
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    operands = [x, codes, jax.lax.bitcast_convert_type(scale, jnp.uint8) if powers else scale]
    operands += [] if zero_point is None else [zero_point]
    partial = pl.pallas_call(
        functools.partial(_kernel, plan),
        # neighbours share their rows of the weight, which come from memory once; x is small and stays in the L2
        grid=(-(-m // tile.tile_m), -(-n // tile.tile_n), tile.split_k),
        out_shape=result((tile.split_k, m, n), out_dtype if whole else jnp.float32, *operands),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_{codes.dtype.name}_matmul",
    )(*operands)
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=None, bias=bias, activation=activation, residual=residual
    )
