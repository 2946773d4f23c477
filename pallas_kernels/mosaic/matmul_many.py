"""y = residual + activation(x @ w + bias) on Hopper for many rows of x, with weights of 4 bits.

Operands and arithmetic are those of `matmul_packed`: codes become the operand of `wgmma` that stays in registers, the
product is `y.T`, scales multiply the float32 sums of their groups. What differs is how much a program computes, and
that it stays.

Tile: 128 rows of the weight by `tile_m` of x, two consumer warpgroups of 64 x `tile_m`. What a warpgroup has decoded
meets all of `tile_m`, in pieces of 64 rows of x, each a product with sums of its own:

    values [64, 128]  ──wgmma──▶ part 0 [64, 64]          total 0 += part 0 * scale
                      ──wgmma──▶ part 1 [64, 64]          total 1 += part 1 * scale    while part 2 is multiplied
                      ──wgmma──▶ part 2 [64, 64]  ...

so that a thread holds `tile_m / 2` totals, 64 parts and 32 values. The warpgroups take turns: one begins the products
of a block when the other has begun half of its own, so that one multiplies while the other decodes.

Work: as many programs as multiprocessors, each with every so manieth tile. The ring of stages runs through: while a
tile is rounded and stored, the next one's codes and rows of x arrive. Two programs side by side along N (`cluster`)
fetch half of the rows of x each, for both.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.mosaic import accumulate, columns, sums
from pallas_kernels.mosaic.launch import launch, place_in, slot_of
from pallas_kernels.mosaic.many_tiles import STAGED, STRIP, ManyTile, candidates, first_choice
from pallas_kernels.mosaic.operand import BLOCK, ROWS, SINGLE, VALUES
from pallas_kernels.mosaic.pieces import piece_of, whole_tiles
from pallas_kernels.mosaic.plan import Plan, entries_of
from pallas_kernels.mosaic.producer import produce, ring
from pallas_kernels.mosaic.walk import Walk

LEAST_GROUP = 64  # whose sums are one product; of e2m1, whose scales multiply the values, any


def unsupported(m: int, k: int, n: int, *, weight: str, group: int, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if weight != "e2m1" and group < LEAST_GROUP:
        return f"it takes groups of {LEAST_GROUP} or more, not of {group}"
    return why_not(k, n, weight=weight, group=group, **facts)


def configs(
    m: int, k: int, n: int, *, weight: str, group: int, smem: int, symmetric: bool, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring."""
    return [dataclasses.asdict(tile) for tile in candidates(m, weight, entries_of(group, not symmetric), smem)]


def _multiply(plan: Plan[ManyTile], s: Any, slot: jax.Array, warpgroup: jax.Array, totals: Any, dtype: str) -> Any:
    """Totals, one `[64, STRIP]` for each strip of x, and the products of a stage."""
    found, strips = list(totals), range(len(totals))
    order = list(itertools.product(range(plan.pieces), strips))

    def x_of(piece: int, strip: int) -> Any:
        return s["x"].at[slot, pl.ds(strip * STRIP, STRIP), pl.ds(piece * plan.width, plan.width)]

    def add(strip: int, part: jax.Array, scale: jax.Array | None) -> None:
        found[strip] = accumulate.add_scaled(found[strip], part, scale, plan.interpret)

    if plan.interpret:  # which takes wgmma's first operand from memory alone
        for piece in range(plan.pieces):
            values, scale = piece_of(plan, s, slot, warpgroup, piece, dtype)
            for strip in strips:
                x = x_of(piece, strip)[...].astype(jnp.float32)
                add(strip, values.astype(jnp.float32) @ x.T, scale)
        return tuple(found)
    flying: list[Any] = []
    for i, (piece, strip) in enumerate(order):
        if strip == 0:
            values, scale = piece_of(plan, s, slot, warpgroup, piece, dtype)
            values = sums.ready(values)
        if i == 0:
            plgpu.barrier_wait(s["turn"].at[warpgroup])
        flying.append((strip, sums.begin(values, x_of(piece, strip), plan.swizzle), scale))
        if i + 1 == (len(order) + 1) // 2:
            plgpu.barrier_arrive(s["turn"].at[1 - warpgroup])
        while len(flying) > (i + 1 < len(order)):  # one goes on while the sums of the one before are added
            of, part, factor = flying.pop(0)
            add(of, sums.finished(part, len(flying)), factor)
    return tuple(found)


def _store(totals: Any, smem: Any, out: Any) -> None:
    """Sums `[64, STRIP]` of each strip of x -> `[tile_m, 64]` in device memory; what lies outside is not written."""
    stored = smem.shape[0]
    for i, total in enumerate(totals):
        for first in range(0, STRIP, stored):
            part = total[:, first : first + stored]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last part's, which was in the same place
            if smem.dtype == jnp.float32:
                part = plgpu.layout_cast(part, SINGLE)
            smem.T[...] = part.astype(smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, out.at[pl.ds(i * STRIP + first, stored)])


def walk_of(plan: Plan[ManyTile], sms: int) -> Walk:
    """All of M first: rows of the weight come from memory once."""
    along_m, along_n, _ = plan.grid
    return Walk(along_m, along_n, min(sms // plan.tile.cluster, along_m * along_n), band=along_m)


def _kernel(plan: Plan[ManyTile], sms: int, *refs: Any, **s: Any) -> None:
    """One warpgroup of one program: see the module's docstring."""
    tile = plan.tile
    x_ref, w_ref, scale_ref, *zero_ref, out_ref = refs
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    walk = walk_of(plan, sms)
    count = walk.count(program)
    few, many = tile.handed_over(entries_of(plan.group, plan.zeros))

    def corner(which: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of a program's tile: its first row of x, of the weight."""
        along_m, along_n = walk.tile(program, which)
        return along_m * tile.tile_m, (along_n * tile.cluster + place_in(tile.cluster)) * tile.rows

    @pl.when(warpgroup == tile.consumers)
    def fill() -> None:
        plgpu.set_max_registers(few, action="decrease")

        def at(i: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Of a stage: see `produce`. Beyond the last it is the last tile's."""
            which = jnp.minimum(jax.lax.div(i, plan.rounds), count - 1)
            return *corner(which), jax.lax.rem(i, plan.rounds)

        named = dict(zip(("scale", "zero"), (scale_ref, *zero_ref), strict=False))
        produce(plan, at, count * plan.rounds, x_ref, w_ref, named, s)

    @pl.when(warpgroup < tile.consumers)
    def multiply() -> None:
        plgpu.set_max_registers(many, action="increase")

        @pl.when(warpgroup == 1)
        def first_turn() -> None:
            plgpu.barrier_arrive(s["turn"].at[0])

        @pl.loop(0, count)
        def one(which: jax.Array) -> None:
            def step(i: jax.Array, totals: Any) -> Any:
                slot = slot_of(which * plan.rounds + i, tile.stages)
                plgpu.barrier_wait(s["full"].at[slot])
                totals = _multiply(plan, s, slot, warpgroup, totals, x_ref.dtype.name)
                plgpu.barrier_arrive(s["empty"].at[slot])
                return totals

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, STRIP), jnp.float32), VALUES)
            totals = jax.lax.fori_loop(0, plan.rounds, step, (zeros,) * (tile.tile_m // STRIP))
            first_x, first_row = corner(which)
            out = out_ref.at[pl.ds(first_x, tile.tile_m), pl.ds(first_row + warpgroup * ROWS, ROWS)]
            _store(totals, s["out"].at[warpgroup], out)

        plgpu.wait_smem_to_gmem(0)


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
    """The product of the module's docstring; arguments are those of `matmul_packed.matmul`.

    Args:
      config: fields of `ManyTile`; empty takes `first_choice` for the shape.
      (others: see there)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    m, (n, blocks) = x.shape[0], packed.shape[:2]
    entries = entries_of(group, zero_point is not None)
    tile = ManyTile(**config) if config else first_choice(m, n, weight, entries, sms, smem)
    whole_row = scale.shape[1] == 1
    plan = Plan(
        m, n, blocks, weight, scale.dtype.name, blocks * BLOCK if whole_row else group, zero_point is not None, tile,
        interpret,
    )  # fmt: skip
    whole = all(v is None for v in (global_scale, bias, activation, residual))
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    stored = out_dtype if whole else jnp.dtype(jnp.float32)
    unit = 16 // stored.itemsize  # rows of the copy engine's arrays are whole 16 bytes
    y = launch(
        functools.partial(_kernel, plan, sms),
        jax.ShapeDtypeStruct((m, -(-n // unit) * unit), stored),
        programs=walk_of(plan, sms).programs,
        warpgroups=tile.consumers + 1,
        name=f"qjax_{weight}_hopper_many",
        scratch=ring(plan, x.dtype)
        | {"turn": plgpu.Barrier(num_arrivals=1, num_barriers=2)}
        | {"out": plgpu.SMEM((tile.consumers, STAGED // (ROWS * stored.itemsize), ROWS), stored)},
        cluster=tile.cluster,
        interpret=interpret,
    )(whole_tiles(x), packed.reshape(n, -1), columns.as_loaded(scale), *[] if zero_point is None else [zero_point])
    y = y[:, :n]
    if whole:
        return y
    return finish(y, out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual)
