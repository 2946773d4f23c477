"""y = residual + activation(x @ w + bias) on Hopper where both operands are of eight bits, for many rows of x.

    y[m, n] = sum_k x[m, k] * codes[n, k] * x_scale[m] * scale[n]

Operands
    x          int8 or float8_e4m3fn [M, K]; x_scale float32 [M, 1]
    codes      of x's dtype [N, K], natural order, K a multiple of 16
    scale      float16, bfloat16 or float32 [N, 1] or [1, 1]; bias [N]; residual [M, N]

Work: one program a multiprocessor walks over tiles of 128 rows of x and `tile_n` of the weight, in bands of 16 tiles
along M, so that those that run together share rows of both operands in the L2. Its warpgroups:

    producer    TMA: x [128, 128], codes [tile_n, 128] ──▶ ring of stages in shared memory, across tiles;
                its lanes: the tile's scales and bias ──▶ float32 in shared memory
    2 consumers ──wgmma, both operands from shared memory──▶ sums [64, tile_n] in registers
                ──scales, bias──▶ y in shared memory, 128 bytes a row ──TMA──▶ y

While consumers finish a tile, the producer fills the ring for the next one. A cluster's programs lie side by side along
M: each fetches half of the weight's tile for both, which is half of what the L2 has to deliver of it.

N and K may be anything that the copy engine takes: it fills what lies outside with zeros and does not write there. A
result whose rows are no whole 16 bytes is padded and cut.

Numerics: int8 sums exactly in int32. e4m3 sums `PROMOTED` steps of 128 products in the tensor cores, which keep 14 bits
there, and those sums in float32. One rounding, of the result.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.mosaic.launch import launch, shared_in, slot_of
from pallas_kernels.mosaic.lines import LINE, in_lines, views
from pallas_kernels.mosaic.operand import OF_ROWS, ROWS, VALUES
from pallas_kernels.mosaic.w8a8_plan import STEP, TILE_M, Plan, Tile, candidates, tile_for
from pallas_kernels.mosaic.walk import CONSUMERS, SLOTS, Roles, barriers, walk

PROMOTED = 2  # steps of e4m3 whose sum stays in the tensor cores before it joins the total
MOST_EXACT_K = 2**31 // (128 * 128) - 1  # products of int8 codes whose sum int32 holds
_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, group: int, block_n: int, transposed: bool,
    scale_dtype: str, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if weight not in ("int8", "e4m3") or x_format != weight:
        return f"it takes weight and x both in int8 or both in e4m3, not {weight} with {x_format or 'x as it is'}"
    if group < k or block_n not in (1, n):
        return f"its scales belong to one row or to all, not to {block_n} rows and {group} columns"
    if scale_dtype.startswith("float8"):
        return f"it does not read scales in {scale_dtype}"
    if k % 16:
        return f"the copy engine takes rows of whole 16 bytes, not of {k}"
    if weight == "int8" and k > MOST_EXACT_K:
        return f"int32 sums of K={k} could overflow; at most {MOST_EXACT_K}"
    return None


def configs(m: int, k: int, n: int, *, weight: str, smem: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring."""
    return [dataclasses.asdict(tile) for tile in candidates(m, weight, smem)]


def _fill(plan: Plan, first: jax.Array, first_x: jax.Array, first_w: jax.Array, refs: Any, s: Any) -> None:
    """A tile's stages, from number `first` on."""
    tile = plan.tile
    (x_lines, _), (w_lines, _) = views(s["x"], plan.interpret), views(s["w"], plan.interpret)

    @pl.loop(0, plan.steps)
    def one(step: jax.Array) -> None:
        slot = slot_of(first + step, tile.stages)
        plgpu.barrier_wait(s["empty"].at[slot])
        part, full = pl.ds(step * STEP, STEP), s["full"].at[slot]
        plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(first_x, TILE_M), part], x_lines.at[slot], full)
        w, shared = refs["w"].at[pl.ds(first_w, tile.tile_n), part], shared_in(tile.cluster)
        plgpu.copy_gmem_to_smem(w, w_lines.at[slot], full, collective_axes=shared)


def _sums(plan: Plan, warpgroup: jax.Array, first: jax.Array, count: Any, s: Any) -> jax.Array:
    """The products of `count` stages from number `first` on, `[64, tile_n]`, one always on its way."""
    (_, x_tiles), (_, w_tiles) = views(s["x"], plan.interpret), views(s["w"], plan.interpret)
    dtype = jnp.int32 if x_tiles.dtype == jnp.int8 else jnp.float32

    def multiply(acc: Any) -> jax.Array:
        def start(step: jax.Array) -> None:
            slot = slot_of(step, plan.tile.stages)
            plgpu.barrier_wait(s["full"].at[slot])
            plgpu.wgmma(acc, x_tiles.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_tiles.at[slot].T)

        start(first)

        @pl.loop(first + 1, first + count)
        def more(step: jax.Array) -> None:
            start(step)
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(s["empty"].at[slot_of(step - 1, plan.tile.stages)])

        found = plgpu.wgmma_accumulator_load(acc)
        plgpu.barrier_arrive(s["empty"].at[slot_of(first + count - 1, plan.tile.stages)])
        return found

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, plan.tile.tile_n), dtype))


def _total(plan: Plan, warpgroup: jax.Array, first: jax.Array, s: Any) -> jax.Array:
    """The products of a tile's stages, `[64, tile_n]`."""
    x_tiles = views(s["x"], plan.interpret)[1]
    if x_tiles.dtype == jnp.int8:
        return _sums(plan, warpgroup, first, plan.steps, s)

    def part(i: jax.Array, total: jax.Array) -> jax.Array:
        count = jnp.minimum(plan.steps - i * PROMOTED, PROMOTED)
        return total + _sums(plan, warpgroup, first + i * PROMOTED, count, s)

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, plan.tile.tile_n), jnp.float32), VALUES)
    return jax.lax.fori_loop(0, -(-plan.steps // PROMOTED), part, zeros)


def _store(plan: Plan, warpgroup: jax.Array, total: jax.Array, at: Any, s: Any) -> None:
    """Scales a tile's sums, adds the bias and writes them, a piece of 128 bytes a row at a time."""
    lines, tiles = views(s["out"], plan.interpret)
    width = tiles.shape[-1]
    of_x = plgpu.load(s["x_scale"].at[pl.ds(warpgroup * ROWS, ROWS)], layout=OF_ROWS, optimized=False)

    def of_columns(name: str, first: int) -> jax.Array:
        entries = plgpu.load(s[name].at[pl.ds(first, width)], layout=_OF_COLUMNS, optimized=False)
        return jax.lax.broadcast_in_dim(entries, (ROWS, width), (1,))

    for i, first in enumerate(range(0, plan.tile.tile_n, width)):
        part = total[:, first : first + width].astype(jnp.float32)
        part = part * (jax.lax.broadcast_in_dim(of_x, part.shape, (0,)) * of_columns("scale", first))
        if plan.bias:
            part = part + of_columns("bias", first)
        plgpu.wait_smem_to_gmem(min(i, SLOTS - 1), wait_read_only=True)  # the first: all of the tile before
        tiles[warpgroup, i % SLOTS] = part.astype(tiles.dtype)
        plgpu.commit_smem()
        first_x, first_w = at
        rows = pl.ds(first_x + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(lines.at[warpgroup, i % SLOTS], s["y"].at[rows, pl.ds(first_w + first, width)])


def _scratch(plan: Plan, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    tile = plan.tile
    found = dict(
        x=in_lines((tile.stages, TILE_M, STEP), dtype, plan.interpret),
        w=in_lines((tile.stages, tile.tile_n, STEP), dtype, plan.interpret),
        out=in_lines((CONSUMERS, SLOTS, ROWS, LINE // jnp.dtype(out_dtype).itemsize), out_dtype, plan.interpret),
        x_scale=plgpu.SMEM((TILE_M,), jnp.float32),
        scale=plgpu.SMEM((tile.wide,), jnp.float32),
    ) | barriers(tile, arrivals=2)
    if plan.bias:
        found["bias"] = plgpu.SMEM((tile.wide,), jnp.float32)
    return found


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    weight: str,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: dict[str, int] | None = None,
    sms: int = 132,
    smem: int = 227 * 1024,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: `int8` or `e4m3`.
      activation: elementwise, on float32.
      out_dtype: of the result.
      config: fields of `Tile`; empty takes `tile_for` the shape and the chip: `sms` multiprocessors, `smem` bytes of
        shared memory that a program may have.
      interpret: run in JAX's interpreter of such kernels, on any machine; it raises where they race.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`.
    """
    (m, k), n = x.shape, codes.shape[0]
    tile = Tile(**config) if config else tile_for(m, n, weight=weight, sms=sms, smem=smem)
    whole = activation is None and residual is None
    stored = jnp.dtype(out_dtype if whole else jnp.float32)
    plan = Plan(m, n, k, whole and bias is not None, tile, sms, interpret)
    operands = dict(x=x, w=codes, x_scale=x_scale, scale=scale)
    if plan.bias:
        assert bias is not None
        operands["bias"] = bias[:, None]
    unit = 16 // stored.itemsize  # rows of the copy engine's arrays are whole 16 bytes
    entries = dict(x_scale=(0, TILE_M), scale=(1, tile.wide)) | (dict(bias=(1, tile.wide)) if plan.bias else {})
    roles = Roles(_fill, entries, _total, _store)
    y = launch(
        functools.partial(walk, plan, roles, tuple(operands)),
        jax.ShapeDtypeStruct((m, -(-n // unit) * unit), stored),
        name=f"qjax_w8a8_{weight}_hopper",
        programs=plan.walk.programs,
        warpgroups=CONSUMERS + 1,
        scratch=_scratch(plan, x.dtype, stored),
        cluster=tile.cluster,
        interpret=interpret,
    )(*operands.values())[:, :n]
    if whole:
        return y
    return finish(y, out_dtype, global_scale=None, bias=bias, activation=activation, residual=residual)
