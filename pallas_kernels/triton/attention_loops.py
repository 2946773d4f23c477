"""One program's slots of a cache: softmax and sum of values as it goes, by tensor cores or by lanes.

`decode_attention.py` says when which, and what of it is drawn there.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton import thread_products
from pallas_kernels.triton.attention_plan import Plan

NOTHING = -1e30  # a score of nothing: -inf would turn an empty share into NaN
Sums = tuple[jax.Array, jax.Array, jax.Array]  # largest score, sum of weights, sum of values: `[C]`, `[C]`, `[D, C]`


def capped(plan: Plan, scores: jax.Array) -> jax.Array:
    """Scores as powers of two."""
    if plan.softcap is None:
        return scores * (plan.scale * math.log2(math.e))
    return jnp.tanh(scores * (plan.scale / plan.softcap)) * (plan.softcap * math.log2(math.e))


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of one row and key-value head that a program reads: blocks `first` to `last` from slot `begin` on."""

    plan: Plan
    of_keys: tuple[Any, ...]  # codes or numbers, and scales
    of_values: tuple[Any, ...]
    at: tuple[Any, Any]
    begin: jax.Array
    end: jax.Array
    first: jax.Array
    last: jax.Array

    def loaded(self, slots: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Keys and values `[slots, D]`, zeros past the end, and the scales of both."""
        head_dim, wide = self.plan.head_dim, self.plan.shape[0]
        columns = jnp.arange(wide)[None, :]
        mask = jnp.broadcast_to((slots < self.end)[:, None], (slots.size, wide))
        mask = mask if head_dim == wide else mask & (columns < head_dim)
        keys, values = (
            plgpu.load(ref.at[*self.at, slots[:, None], columns], mask=mask, other=jnp.zeros((), ref.dtype))
            for ref in (self.of_keys[0], self.of_values[0])
        )
        scales = [
            plgpu.load(ref.at[*self.at, slots], mask=slots < self.end, other=jnp.float32(0))
            for ref in (*self.of_keys[1:], *self.of_values[1:])
        ]
        return keys, values, scales


def by_tensor_cores(slots: Slots, queries: jax.Array) -> Sums:
    """A block's keys are one product with all queries `[D, C]`, its values another with the weights."""
    plan, block = slots.plan, slots.plan.tile.block
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def step(i: jax.Array, sums: Sums) -> Sums:
        largest, total, attended = sums
        here = slots.begin + i * block + jnp.arange(block)
        keys, values, scales = slots.loaded(here)
        scores = plgpu.dot(keys.astype(queries.dtype), queries, precision=precision)
        scores = capped(plan, scores * scales[0][:, None] if scales else scores)
        scores = jnp.where((here < slots.end)[:, None], scores, jnp.float32(NOTHING))
        now = jnp.maximum(largest, jnp.max(scores, axis=0))
        weights, faded = jnp.exp2(scores - now[None, :]), jnp.exp2(largest - now)
        factors = (weights * scales[1][:, None] if scales else weights).astype(queries.dtype)
        part = plgpu.dot(values.astype(queries.dtype), factors, trans_a=True, precision=precision)
        return now, total * faded + jnp.sum(weights, axis=0), attended * faded[None, :] + part

    columns = plan.shape[1]
    nothing = jnp.full(columns, NOTHING, jnp.float32), *map(jnp.zeros, (columns, plan.shape))
    return jax.lax.fori_loop(slots.first, slots.last, step, nothing)


def by_lanes(slots: Slots, queries: list[jax.Array]) -> list[Sums]:
    """Each of the `rows` slots side by side has a softmax of its own: only a score crosses lanes before the end."""
    plan, tile = slots.plan, slots.plan.tile
    integers, threads = slots.of_keys[0].dtype == jnp.int8, 32 * tile.warps
    digits = [thread_products.digits(query) if integers else (query,) for query in queries]

    def slots_of(block: jax.Array) -> list[jax.Array]:
        first = slots.begin + block * tile.block
        return [first + row + jnp.arange(tile.rows) for row in range(0, tile.block, tile.rows)]

    def score_of(digit: tuple[jax.Array, ...], slot: jax.Array, keys: jax.Array, scales: list[jax.Array]) -> jax.Array:
        if integers:
            high, low, scale = digit
            score = thread_products.dot_of_codes(keys, high, low, threads, plan.interpret) * scale
        else:
            score = thread_products.dot(keys.astype(jnp.float32), digit[0], threads, plan.interpret)
        score = capped(plan, score * scales[0] if scales else score)
        return jnp.where(slot < slots.end, score, jnp.float32(NOTHING))

    def step(i: jax.Array, state: tuple[list[Sums], Any]) -> tuple[list[Sums], Any]:
        sums, loaded = state
        following = None
        if tile.stages == 1:
            loaded = [slots.loaded(slot) for slot in slots_of(i)]
        else:
            following = [slots.loaded(slot) for slot in slots_of(i + 1)]
        after = []
        for digit, (largest, total, attended) in zip(digits, sums, strict=True):
            scores = [
                score_of(digit, slot, keys, scales) for slot, (keys, _, scales) in zip(slots_of(i), loaded, strict=True)
            ]
            now = functools.reduce(jnp.maximum, scores, largest)
            faded, weights = jnp.exp2(largest - now), [jnp.exp2(score - now) for score in scores]
            total, attended = sum(weights, total * faded), attended * faded[:, None]
            values = [values for _, values, _ in loaded]
            factors = [w * scales[1] if scales else w for w, (_, _, scales) in zip(weights, loaded, strict=True)]
            if integers:
                for at in (slice(first, first + 4) for first in range(0, len(values), 4)):
                    attended = thread_products.add_scaled_codes(attended, values[at], factors[at], plan.interpret)
            else:
                for value, factor in zip(values, factors, strict=True):
                    wide = value.astype(jnp.float32)
                    attended = thread_products.add_scaled(attended, wide, factor[:, None], plan.interpret)
            after.append((now, total, attended))
        return after, following

    nothing = jnp.full(tile.rows, NOTHING, jnp.float32), jnp.zeros(tile.rows), jnp.zeros((tile.rows, plan.shape[0]))
    begun = None if tile.stages == 1 else [slots.loaded(slot) for slot in slots_of(slots.first)]
    found, _ = jax.lax.fori_loop(slots.first, slots.last, step, ([nothing] * plan.parts, begun))
    return [_rows_joined(*sums) for sums in found]


def _rows_joined(largest: jax.Array, total: jax.Array, attended: jax.Array) -> Sums:
    """One softmax of several, `[R]`, `[R]`, `[R, D]`."""
    now = jnp.max(largest, axis=0)
    faded = jnp.exp2(largest - now)
    total, attended = jnp.sum(total * faded, axis=0), jnp.sum(attended * faded[:, None], axis=0)
    return now[None], total[None], attended[:, None]
