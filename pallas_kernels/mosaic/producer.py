"""The producer: the warpgroup of a program that fills stage after stage in shared memory, for those that multiply.

Codes and x come by the copy engine; scales and zero points by its lanes, one stage ahead, since these wait for them.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import columns
from pallas_kernels.mosaic.launch import read_barriers, shared_in, slot_of
from pallas_kernels.mosaic.operand import BLOCK, WORDS_A_BLOCK
from pallas_kernels.mosaic.plan import Plan
from pallas_kernels.pairs import MAGIC

Place = tuple[Any, Any, Any]


def _entry_of(plan: Plan, ref: Any, stage: jax.Array, index: int) -> jax.Array:
    """Which column of scales is number `index` of a stage's."""
    column = (
        stage * (plan.tile.blocks * plan.groups) + index
        if plan.group <= BLOCK
        else (stage * plan.tile.blocks + index) // (plan.group // BLOCK)
    )
    return jnp.minimum(column, ref.shape[1] - 1)


def _bring_columns(
    plan: Plan, refs: dict[str, Any], first_row: jax.Array, stage: jax.Array, dtype: str
) -> dict[str, list[jax.Array]]:
    """A stage's scales and zero points as they are used, 32 bits each, `[column_rows]` for each group."""
    found: dict[str, list[jax.Array]] = {name: [] for name in refs}
    for name, index in itertools.product(refs, range(plan.tile.blocks * plan.groups)):
        column = _entry_of(plan, refs[name], stage, index)
        raw = columns.read(refs[name], first_row, column, plan.tile.column_rows, plan.interpret)
        entry = columns.value(raw, plan.scale)
        if name == "zero":
            entry = columns.pair(-MAGIC[dtype][1] - entry, dtype, plan.interpret)
        elif plan.scales_values:
            entry = columns.pair(entry, dtype, plan.interpret)
        found[name].append(entry)
    return found


def ring(plan: Plan, x_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers that `produce` fills."""
    tile, smem = plan.tile, plgpu.SMEM
    entries = (tile.stages, tile.blocks * plan.groups, tile.column_rows)
    found = dict(
        w=smem((tile.stages, tile.blocks, tile.rows, WORDS_A_BLOCK), jnp.uint32),
        x=smem((tile.stages, tile.tile_m, tile.blocks * BLOCK), x_dtype, transforms=plan.swizzle),
        scale=smem(entries, jnp.uint32 if plan.scales_values else jnp.float32),
        full=plgpu.Barrier(num_arrivals=tile.blocks + 2, num_barriers=tile.stages),
        empty=read_barriers(tile.cluster, tile.row_groups, tile.stages),
    )
    if plan.zeros:
        found["zero"] = smem(entries, jnp.uint32)
    return found


def produce(plan: Plan, at: Callable[[Any], Place], count: Any, x_ref: Any, w_ref: Any, refs: Any, s: Any) -> None:
    """Fills the stages of one program, one after the other.

    Args:
      at: of the program's i-th stage the first row of x, of the weight, and which stage of K it is; i = `count` too,
        which is not filled.
      count: of stages, `plan.rounds` at least.
      x_ref: `[M, K]`; w_ref: uint32 `[N, 16 B]`; refs: "scale" and, where there are any, "zero", `[N, groups]`.
      s: shared memory and barriers, of `ring`.
    """
    tile, stage = plan.tile, plan.tile.blocks * BLOCK

    def codes_of(place: Place, block: int, blocks: int) -> Any:
        _, first_row, of_k = place
        first = (of_k * tile.blocks + block) * WORDS_A_BLOCK
        return w_ref.at[pl.ds(first_row, tile.rows), pl.ds(first, blocks * WORDS_A_BLOCK)]

    if not plan.interpret:  # which knows neither
        for i in range(min(tile.stages, plan.rounds)):
            plgpu.async_prefetch(codes_of(at(i), 0, tile.blocks))
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

    def copy(i: jax.Array) -> None:
        slot, place = slot_of(i, tile.stages), at(i)
        for block in range(tile.blocks):
            plgpu.copy_gmem_to_smem(codes_of(place, block, 1), s["w"].at[slot, block], s["full"].at[slot])
        x = x_ref.at[pl.ds(place[0], tile.tile_m), pl.ds(place[2] * stage, stage)]
        plgpu.copy_gmem_to_smem(x, s["x"].at[slot], s["full"].at[slot], collective_axes=shared_in(tile.cluster))

    def bring(i: Any) -> dict[str, list[jax.Array]]:
        _, first_row, of_k = at(i)
        return _bring_columns(plan, refs, first_row, of_k, x_ref.dtype.name)

    def store(i: jax.Array, entries: dict[str, list[jax.Array]]) -> dict[str, list[jax.Array]]:
        for name, of_groups in entries.items():
            for index, entry in enumerate(of_groups):
                s[name][slot_of(i, tile.stages), index] = entry
        plgpu.barrier_arrive(s["full"].at[slot_of(i, tile.stages)])
        return bring(i + 1)

    def refill(i: jax.Array, entries: dict[str, list[jax.Array]]) -> dict[str, list[jax.Array]]:
        plgpu.barrier_wait(s["empty"].at[slot_of(i, tile.stages)])
        plgpu.commit_smem()  # what lanes have read there, the copy engine may overwrite
        copy(i)
        return store(i, entries)

    # All copies that need not wait first: a lane that waits for its first scales holds them up otherwise.
    first = min(tile.stages, plan.rounds)
    pl.loop(0, first)(copy)
    entries = jax.lax.fori_loop(0, first, store, bring(0))
    jax.lax.fori_loop(first, count, refill, entries)

    @pl.loop(jnp.maximum(tile.stages, count), count + tile.stages)  # until all that was filled was read
    def drain(i: jax.Array) -> None:
        plgpu.barrier_wait(s["empty"].at[slot_of(i, tile.stages)])
