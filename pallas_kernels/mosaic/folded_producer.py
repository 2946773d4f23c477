"""What the producer of `matmul_folded` does: the stages of a tile, their scales as the values want them.

Codes and x come by the copy engine; scales and zero points by its lanes, asked for some stages ahead. They are pairs of
float16, times a power of two that is the row's, and so all of a row's scales are read once before the first is made.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import columns
from pallas_kernels.mosaic.fit_rows import power
from pallas_kernels.mosaic.folded_plan import HALF, Plan
from pallas_kernels.mosaic.launch import shared_in, slot_of
from pallas_kernels.mosaic.lines import views
from pallas_kernels.mosaic.operand import BLOCK
from pallas_kernels.pairs import MAGIC

_READ_AT_ONCE = 16  # of a row's scales, by the lane that looks for the largest


def _largest(plan: Plan, scale: Any, first_w: jax.Array) -> jax.Array:
    """The largest scale of each row of a tile, float32 `[column_rows]`."""
    last = scale.shape[1] - 1
    at_once = min(_READ_AT_ONCE * columns.LANES // plan.tile.column_rows, last + 1)

    def more(i: jax.Array, largest: jax.Array) -> jax.Array:
        found = []
        for j in range(at_once):
            column = jnp.minimum(i * at_once + j, last)
            found.append(columns.read(scale, first_w, column, plan.tile.column_rows, plan.interpret))
        return functools.reduce(jnp.maximum, [jnp.abs(columns.value(raw, plan.scale)) for raw in found], largest)

    first = columns.read(scale, first_w, jnp.int32(0), plan.tile.column_rows, plan.interpret)
    first = jnp.abs(columns.value(first, plan.scale))
    return jax.lax.fori_loop(0, -(-(last + 1) // at_once), more, first)


def fill(plan: Plan, first: jax.Array, first_x: jax.Array, first_w: jax.Array, refs: Any, s: Any) -> None:
    """A tile's stages, from number `first` on."""
    tile, groups = plan.tile, plan.groups
    x_lines, _ = views(s["x"], plan.interpret)
    names = ("scale", "zero") if plan.zeros else ("scale",)

    def copy(stage: Any) -> None:
        slot = slot_of(first + stage, tile.stages)
        plgpu.barrier_wait(s["empty"].at[slot])
        if plan.interpret:  # on the chip a barrier orders what lanes have read before what the copy engine writes
            plgpu.commit_smem()
        full, width = s["full"].at[slot], tile.blocks * plan.words
        words = refs["w"].at[pl.ds(first_w, tile.rows), pl.ds(stage * width, width)]
        plgpu.copy_gmem_to_smem(words, s["w"].at[slot], full)
        for half in range(2 * tile.blocks):
            columns_of_x = pl.ds((stage * 2 * tile.blocks + half) * HALF, HALF)
            x = refs["x"].at[pl.ds(first_x, tile.tile_m), columns_of_x]
            plgpu.copy_gmem_to_smem(x, x_lines.at[slot, half], full, collective_axes=shared_in(tile.cluster))

    def entries(stage: Any) -> list[jax.Array]:
        """Of a stage, as they are in memory."""
        found = []
        for name, i in itertools.product(names, range(tile.blocks * groups)):
            column = (
                stage * tile.blocks * groups + i
                if plan.group <= BLOCK
                else jax.lax.div(stage * tile.blocks + i, jnp.int32(plan.group // BLOCK))
            )
            column = jnp.minimum(column, refs[name].shape[1] - 1)
            found.append(columns.read(refs[name], first_w, column, tile.column_rows, plan.interpret))
        return found

    # Copies of the first tile's first stages are under way before scales are waited for.
    at_once = min(tile.stages, plan.rounds)

    @pl.when(first == 0)
    def begin() -> None:
        pl.loop(0, at_once)(copy)

    to, back = power(_largest(plan, refs["scale"], first_w), plan.largest)
    to = to * jnp.float32(2.0**plan.raised)

    def one(stage: jax.Array, raws: list[jax.Array]) -> None:
        pl.when((first > 0) | (stage >= at_once))(lambda: copy(stage))
        slot = slot_of(first + stage, tile.stages)
        s["power"][slot] = back
        for i, raw in enumerate(raws):
            which, index = divmod(i, tile.blocks * groups)
            value = columns.value(raw, plan.scale)
            value = -MAGIC["float16"][1] - value if which else value * to
            s[names[which]][slot, index] = columns.pair(value, "float16", plan.interpret)
        plgpu.barrier_arrive(s["full"].at[slot])

    def some(i: jax.Array, ahead: list[list[jax.Array]]) -> list[list[jax.Array]]:
        found = []
        for j, raws in enumerate(ahead):
            stage = i * len(ahead) + j
            pl.when(stage < plan.rounds)(functools.partial(one, stage, raws))
            found.append(entries(stage + len(ahead)))
        return found

    ahead = [entries(jnp.int32(j)) for j in range(plan.ahead)]
    jax.lax.fori_loop(0, -(-plan.rounds // plan.ahead), some, ahead)
