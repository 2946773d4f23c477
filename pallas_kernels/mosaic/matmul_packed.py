"""y = residual + activation(x @ w + bias) on Hopper, with weights of 4 bits: int4, e2m1 (MXFP4, NVFP4), NF4, FP4.

    y[m, n] = sum_k x[m, k] * value(code[n, k]) * scale[n, k // g]
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, K]
    packed     uint32 [N, B, 16], B = ceil(K / 128): the packed order
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128; or [1, 1]
    zero_point int8, like scale; bias [N]; residual [M, N]; global_scale float32 [] or [N]

Work: a program owns `rows` of the weight, `tile_m` of x and a share of K (`split_k`). Its warpgroups:

    producer    TMA: codes [rows, 256], x [tile_m, 256] ──▶ ring of stages in shared memory;
                its lanes: scales, zero points ──▶ float32, pairs, by group (`columns`)
    consumers   words ──LDS.128──▶ registers ──`operand`──▶ values [64, 128]
                ──wgmma, x from shared memory──▶ part [64, tile_m];  total += part * scale

The weight is the operand that stays in registers, the product is `y.T`: 64 rows of the weight are what `wgmma` has at
least, 8 rows of x are enough for its other side. Consumers lie `row_groups` side by side and `k_groups` behind one
another; the latter add their totals in shared memory, shares of K in the XLA fusion that finishes.

N and K may be anything: the copy engine fills what lies outside with zeros and does not write there. Only x is copied,
padded, where it is not made of tiles of 8 x 64, and a result whose rows are no whole 16 bytes is padded and cut.

Launch: programmatic. While the kernel before ends, programs set up their barriers and ask for their first codes to come
into the L2, which is right whoever writes them; they wait for it before they read anything.

Scales multiply the float32 sums of their group, each group of a block a product of its own. e8m0 and e4m3 scales times
e2m1 are exact in x's type: they multiply the values, and a block is one product. Integer zero points are subtracted
from the codes where the middle code is anyway.

Numerics: products of values and x are exact in the tensor cores, sums float32, one rounding, of the result. Exception:
NF4 and FP4 values are rounded to x's type.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.mosaic import accumulate, columns
from pallas_kernels.mosaic.launch import launch, place_in, slot_of
from pallas_kernels.mosaic.operand import BLOCK, ROWS, SINGLE, VALUES
from pallas_kernels.mosaic.pieces import piece_of, whole_tiles
from pallas_kernels.mosaic.plan import Plan, entries_of
from pallas_kernels.mosaic.producer import produce, ring
from pallas_kernels.mosaic.tiles import Tile, candidates, decode_tile


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    return why_not(k, n, **facts)


def configs(
    m: int, k: int, n: int, *, group: int, smem: int, sms: int, symmetric: bool, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring."""
    return [dataclasses.asdict(tile) for tile in candidates(m, n, k, entries_of(group, not symmetric), sms, smem)]


def _consume(plan: Plan, row_group: jax.Array, k_group: jax.Array, dtype: str, s: Any) -> jax.Array:
    """A consumer's part: its sums, float32 `[64, tile_m]`. With `ahead` a piece is decoded while the one before
    is multiplied."""
    tile, pieces = plan.tile, plan.tile.blocks * plan.pieces

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        slot = slot_of(i * tile.k_groups + k_group, tile.stages)
        plgpu.barrier_wait(s["full"].at[slot])

        def x_of(index: int) -> Any:
            return s["x"].at[slot, :, pl.ds(index * plan.width, plan.width)]

        def multiply(*parts: Any) -> jax.Array:
            whole, scales = total, []
            for index in range(pieces):
                values, scale = piece_of(plan, s, slot, row_group, index, dtype)
                scales.append(scale)
                plgpu.wgmma(parts[index], values, x_of(index).T)
                if index >= tile.ahead:
                    part = plgpu.wgmma_accumulator_load(parts[index - tile.ahead], wait_n=tile.ahead)
                    whole = accumulate.add_scaled(whole, part, scales[index - tile.ahead], plan.interpret)
            return accumulate.add_scaled(whole, parts[-1][...], scales[-1], plan.interpret) if tile.ahead else whole

        def multiply_plainly() -> jax.Array:
            whole = total
            for index in range(pieces):
                values, scale = piece_of(plan, s, slot, row_group, index, dtype)
                part = values.astype(jnp.float32) @ x_of(index)[...].astype(jnp.float32).T
                whole = accumulate.add_scaled(whole, part, scale, plan.interpret)
            return whole

        if plan.interpret:  # which takes wgmma's first operand from memory alone
            total = multiply_plainly()
        else:
            total = pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((ROWS, tile.tile_m), jnp.float32)] * pieces)
        plgpu.barrier_arrive(s["empty"].at[slot])
        return total

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile.tile_m), jnp.float32), VALUES)
    return jax.lax.fori_loop(0, plan.rounds // tile.k_groups, step, zeros)


def _together(plan: Plan, row_group: jax.Array, k_group: jax.Array, total: jax.Array, s: Any) -> jax.Array:
    """The sums of warpgroups behind one another, for the first of them."""

    @pl.when(k_group > 0)
    def _() -> None:
        s["sums"][k_group - 1, row_group] = total
        plgpu.barrier_arrive(s["summed"].at[row_group])

    def others() -> jax.Array:
        plgpu.barrier_wait(s["summed"].at[row_group])
        whole = total
        for other in range(plan.tile.k_groups - 1):
            whole = whole + plgpu.load(s["sums"].at[other, row_group], layout=VALUES, optimized=False)
        return whole

    return jax.lax.cond(k_group == 0, others, lambda: total)


def _store(total: jax.Array, smem: Any, out: Any) -> None:
    """Sums `[64, tile_m]` -> `[tile_m, 64]` in device memory, in its dtype; what lies outside is not written."""
    if smem.dtype == jnp.float32:
        total = plgpu.layout_cast(total, SINGLE)
    smem.T[...] = total.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, out)
    plgpu.wait_smem_to_gmem(0)


def _kernel(plan: Plan, *refs: Any, **s: Any) -> None:
    """One warpgroup of one program: see the module's docstring."""
    tile = plan.tile
    x_ref, w_ref, scale_ref, *zero_ref, out_ref = refs
    along_m, along_n, _ = plan.grid
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    of_cluster = place_in(tile.cluster)
    first_x = jax.lax.rem(program, along_m) * tile.tile_m
    along = jax.lax.rem(jax.lax.div(program, along_m), along_n)
    first_row = (along * tile.cluster + of_cluster) * tile.rows
    share = jax.lax.div(program, along_m * along_n)
    hand_over = tile.needs > tile.registers
    few, many = tile.handed_over(entries_of(plan.group, plan.zeros))

    @pl.when(warpgroup == tile.consumers)
    def fill() -> None:
        if hand_over:
            plgpu.set_max_registers(few, action="decrease")
        named = dict(zip(("scale", "zero"), (scale_ref, *zero_ref), strict=False))
        produce(plan, lambda i: (first_x, first_row, share * plan.rounds + i), plan.rounds, x_ref, w_ref, named, s)

    @pl.when(warpgroup < tile.consumers)
    def multiply() -> None:
        if hand_over:
            plgpu.set_max_registers(many, action="increase")
        row_group = jax.lax.rem(warpgroup, tile.row_groups)
        k_group = jax.lax.div(warpgroup, tile.row_groups)
        total = _consume(plan, row_group, k_group, x_ref.dtype.name, s)
        if tile.k_groups > 1:
            total = _together(plan, row_group, k_group, total, s)

        @pl.when(k_group == 0)
        def store() -> None:
            first = first_row + row_group * ROWS
            at = out_ref.at[share, pl.ds(first_x, tile.tile_m), pl.ds(first, ROWS)]
            _store(total, s["out"].at[row_group], at)


def _scratch(plan: Plan, x_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    tile, smem = plan.tile, plgpu.SMEM
    found = ring(plan, x_dtype)
    found["out"] = smem((tile.row_groups, tile.tile_m, ROWS), out_dtype)
    if tile.k_groups > 1:
        found["sums"] = smem((tile.k_groups - 1, tile.row_groups, ROWS, tile.tile_m), jnp.float32)
        found["summed"] = plgpu.Barrier(num_arrivals=tile.k_groups - 1, num_barriers=tile.row_groups)
    return found


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
    smem: int = 227 * 1024,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: "int4", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Tile`; empty takes `decode_tile` for the shape.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have.
      interpret: run in JAX's interpreter of such kernels, on any machine; it raises where they race.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, k), (n, blocks) = x.shape, packed.shape[:2]
    entries = entries_of(group, zero_point is not None)
    tile = Tile(**config) if config else decode_tile(m, n, k, entries, sms, smem)
    whole_row = scale.shape[1] == 1
    plan = Plan(
        m, n, blocks, weight, scale.dtype.name, blocks * BLOCK if whole_row else group, zero_point is not None, tile,
        interpret,
    )  # fmt: skip
    whole = tile.split_k == 1 and all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    stored = out_dtype if whole else jnp.dtype(jnp.float32)
    unit = 16 // stored.itemsize  # rows of the copy engine's arrays are whole 16 bytes
    partial = launch(
        functools.partial(_kernel, plan),
        jax.ShapeDtypeStruct((tile.split_k, m, -(-n // unit) * unit), stored),
        programs=math.prod(plan.grid),
        warpgroups=tile.consumers + 1,
        name=f"qjax_{weight}_hopper",
        scratch=_scratch(plan, x.dtype, stored),
        cluster=tile.cluster,
        interpret=interpret,
    )(whole_tiles(x), packed.reshape(n, -1), columns.as_loaded(scale), *[] if zero_point is None else [zero_point])
    partial = partial[:, :, :n]
    if whole:
        return partial[0]
    return finish(
        partial.sum(axis=0), out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
