"""What the producer of `matmul_folded` does: the stages of a tile, their scales as the values want them.

Codes and x come by the copy engine; scales and zero points by its lanes, asked for some stages ahead. They are pairs of
float16, times a power of two that is the row's, and so all of a row's scales are read once before the first is made.
"""

import functools
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

_READ_AT_ONCE = 8  # words of scales, by the lane that looks for the largest: with more, registers do not suffice


def _largest(plan: Plan, scale: Any, first_w: jax.Array) -> jax.Array:
    """The largest scale of each row of a tile, float32 `[column_rows]`."""
    height, width = plan.tile.column_rows, scale.shape[1]
    at_once = min(_READ_AT_ONCE * columns.LANES // height, width)

    def part(i: Any) -> jax.Array:
        if scale.dtype != jnp.uint32:
            many = [jnp.minimum(i * at_once + j, width - 1) for j in range(at_once)]
            raws = [columns.read(scale, first_w, column, height, plan.interpret) for column in many]
            found = [columns.value(raw, plan.scale) for raw in raws]
        else:
            word = jnp.minimum(i * at_once, width - at_once)
            words = columns.read_words(scale, first_w, word, at_once, height, plan.interpret)
            found = [columns.entry(word, j, plan.scale) for word in words for j in range(4 // plan.scale_bytes)]
        return functools.reduce(jnp.maximum, map(jnp.abs, found))

    return jax.lax.fori_loop(1, -(-width // at_once), lambda i, most: jnp.maximum(most, part(i)), part(jnp.int32(0)))


class _Entries:
    """Scales or zero points of the stages of a tile: asked for, then taken as float32."""

    def __init__(self, plan: Plan, ref: Any, dtype: str, first_w: jax.Array) -> None:
        self._plan, self._ref, self._dtype, self._first_w = plan, ref, dtype, first_w
        self._in_words = ref.dtype == jnp.uint32
        self._a_word = 4 // jnp.dtype(dtype).itemsize if self._in_words else 1
        self._count = plan.tile.blocks * plan.groups  # of a stage
        there = ref.shape[1] * self._a_word
        whole = plan.group <= BLOCK and self._count % self._a_word == 0 and there % self._count == 0
        self._words = self._count // self._a_word if self._in_words and whole else 0  # of each stage, if of all

    def _column(self, stage: Any, i: int) -> jax.Array:
        group, blocks = self._plan.group, self._plan.tile.blocks
        column = stage * self._count + i
        if group > BLOCK:
            column = jax.lax.div(stage * blocks + i, jnp.int32(group // BLOCK))
        return jnp.minimum(column, self._ref.shape[1] * self._a_word - 1)

    def ask(self, stage: Any) -> list[jax.Array]:
        """A stage's, as they are in memory; beyond the last it is anything of the rows."""
        height, interpret = self._plan.tile.column_rows, self._plan.interpret
        if self._words:
            word = jnp.minimum(stage * self._words, self._ref.shape[1] - self._words)
            return columns.read_words(self._ref, self._first_w, word, self._words, height, interpret)
        found = []
        for i in range(self._count):
            column = self._column(stage, i)
            if self._in_words:
                word = jax.lax.div(column, jnp.int32(self._a_word))
                found += columns.read_words(self._ref, self._first_w, word, 1, height, interpret)
            else:
                found.append(columns.read(self._ref, self._first_w, column, height, interpret))
        return found

    def values(self, stage: Any, raws: list[jax.Array]) -> list[jax.Array]:
        """What `ask` has found, float32 `[column_rows]` each."""
        if not self._in_words:
            return [columns.value(raw, self._dtype) for raw in raws]
        found = []
        for i in range(self._count):
            word, at = divmod(i, self._a_word) if self._words else (i, self._column(stage, i) % self._a_word)
            found.append(columns.entry(raws[word], at, self._dtype))
        return found


def fill(plan: Plan, first: jax.Array, first_x: jax.Array, first_w: jax.Array, refs: Any, s: Any) -> None:
    """A tile's stages, from number `first` on."""
    tile = plan.tile
    x_lines, _ = views(s["x"], plan.interpret)
    given = [_Entries(plan, refs["scale"], plan.scale, first_w)]
    if plan.zeros:
        given.append(_Entries(plan, refs["zero"], "int8", first_w))

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

    # Copies of the first tile's first stages are under way before scales are waited for.
    at_once = min(tile.stages, plan.rounds)

    @pl.when(first == 0)
    def begin() -> None:
        pl.loop(0, at_once)(copy)

    if plan.exact:
        to, back = jnp.float32(1), jnp.ones((tile.column_rows,), jnp.float32)
    else:
        to, back = power(_largest(plan, refs["scale"], first_w), plan.largest)
        to = to * jnp.float32(2.0**plan.raised)

    def one(stage: jax.Array, raws: list[list[jax.Array]]) -> None:
        pl.when((first > 0) | (stage >= at_once))(lambda: copy(stage))
        slot = slot_of(first + stage, tile.stages)
        s["entries"][slot, plan.entries - 1] = jax.lax.bitcast_convert_type(back, jnp.uint32)
        scales, *zeros = (entries.values(stage, raw) for entries, raw in zip(given, raws, strict=True))
        values = [scale * to for scale in scales] + [-MAGIC["float16"][1] - zero for part in zeros for zero in part]
        for i, value in enumerate(values):
            s["entries"][slot, i] = columns.pair(value, "float16", plan.interpret)
        plgpu.barrier_arrive(s["full"].at[slot])

    def ask(stage: Any) -> list[list[jax.Array]]:
        return [entries.ask(stage) for entries in given]

    def some(i: jax.Array, ahead: list[list[list[jax.Array]]]) -> list[list[list[jax.Array]]]:
        found = []
        for j, raws in enumerate(ahead):
            stage = i * len(ahead) + j
            pl.when(stage < plan.rounds)(functools.partial(one, stage, raws))
            found.append(ask(stage + len(ahead)))
        return found

    ahead = [ask(jnp.int32(j)) for j in range(plan.ahead)]
    jax.lax.fori_loop(0, -(-plan.rounds // plan.ahead), some, ahead)
