"""One new token a row: its query and key are turned, key and value go into the cache, and it attends to the cache.

    q, k = rotary(q), rotary(k);  keys[slot], values[slot] = k, v
    out = softmax(cap(scale * q @ keys.T)) @ values          over the slots up to the token's own, the last `window`

Operands
    row        [B, (H + 2 * J) * D]: queries of H heads, then keys and values of J; H is a multiple of J
    cos, sin   float32 [B, D / 2]
    positions  int32 [B]: the token's slot; outside of the cache it is not stored, below 0 the result means nothing
    keys, values [B, J, T, D] in row's dtype: donated, they come back changed in one slot a row; or int8 or e4m3, with
    scales     float32 [B, J, T] of keys and of values: `code * scale`, scale = amax / top over D, 1 where that is 0;
               top is 127 or 448

Work: a program has a row, a key-value head j with its H / J query heads, and one of `shares` parts of the slots that
the row sees, so that a cache is read once, no further than the row is long, whatever its capacity. Where several
queries share a cache, products are the tensor cores':

    keys [block, D] --dot q [D, heads]--> scores [block, heads] --softmax, as it goes--> weights
    values.T [D, block] --dot weights--> += out [D, heads]

For that values have to change lanes (and codes their type), which costs more than it saves where a few queries share
one. Then lanes multiply what they have loaded, `rows` slots side by side; nothing but scores crosses lanes:

    lane l has 16 bytes of slots r, rows + r, ...   of each:  part of a score --3 shuffles--> score --> weight
                                                              16 bytes of values * weight --> its own sums of row r

Row r has a softmax of its own, and the rows' are joined at the end. Products of int8 codes are `dp4a`, four at a time:
queries, and the weights of four slots, are two digits of 8 bits; four words of a slot each become four of a number
each by 8 permutations of bytes. So a number costs 1.5 to 3 instructions where converting it alone would take two.

The new key and value are never read from the cache: the program that stores them adds them from their registers, and
no program loads the slot. Few rows and heads would leave most of the chip idle: then a row's slots are cut into
shares, each gives its own softmax with the logarithm of its sum, and a small kernel weighs them together.

Numerics: turned in float32 and rounded to row's dtype, as are the weights of the values for the tensor cores; scores,
softmax and sums are float32 (float32 operands are multiplied as such). Exponentials are powers of two, `ex2.approx`,
off by 2 ulp. Codes are exact in 16 bits; their scales multiply scores and, before they are rounded, weights. Digits: a
query's numbers are rounded to its largest / 32512, weights to the largest of four / 65535. Ties of int8 codes round up.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.result import result
from pallas_kernels.triton.attention_loops import NOTHING, Slots, by_lanes, by_tensor_cores, capped
from pallas_kernels.triton.attention_plan import TOP, Plan, Tile, tile_for


def unsupported(*, heads: int, cache: tuple[int, ...], dtype: Any, cache_dtype: Any, smem: int, cc: int) -> str | None:
    """Why this kernel cannot do a layer's attention, over a cache of that shape, on such a device, or None."""
    kv_heads, head_dim = cache[1], cache[3]
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"it takes bfloat16, float16 and float32, not {jnp.dtype(dtype).name}"
    coded = jnp.dtype(cache_dtype).name in TOP
    if not coded and jnp.dtype(cache_dtype) != jnp.dtype(dtype):
        return f"the cache is {jnp.dtype(cache_dtype).name}, the token {jnp.dtype(dtype).name}"
    if coded and jnp.dtype(dtype) == jnp.float32:
        return "codes of a cache become numbers of 16 bits"
    if coded and math.prod(cache) > 2**31:
        return f"a cache of {math.prod(cache)} codes: offsets of bytes have 32 bits"
    if jnp.dtype(cache_dtype) == jnp.float8_e4m3fn and cc < 89:
        return f"Triton converts FP8 from compute capability 8.9 on, this is {cc / 10:.1f}"
    if head_dim % 16 or head_dim > 256:
        return f"heads of {head_dim}: it knows multiples of 16 up to 256"
    if heads % kv_heads or heads // kv_heads > 32:
        return f"{heads} query heads to {kv_heads}: it knows up to 32 a key-value head"
    if cc < 80 or smem < 96 * 1024:
        return (
            f"it keeps blocks in {smem} bytes of shared memory, compute capability {cc / 10:.1f}; 98304 and 8.0 needed"
        )
    return None


def _by_purpose(plan: Plan, refs: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Keys, values, results, new keys and new values; where there are scales, each with its own beside it."""
    count = 4 if plan.coded else 2
    cache, results, new = refs[:count], refs[count : count + 2], refs[count + 2 :]
    return cache[::2], cache[1::2], results, new[::2], new[1::2]


def _turned(plan: Plan, ref: Any, row: Any, head: Any, d: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads of a row, turned. Pairs are D / 2 apart, so each half is loaded for the other, too."""
    half = plan.head_dim // 2
    first, mask = d < half, d < plan.head_dim
    x, partner = (
        plgpu.load(ref.at[row, head, at], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)
        for at in (d, jnp.where(first, d + half, d - half))
    )
    return (x * cos + jnp.where(first, -partner, partner) * sin).astype(ref.dtype)


def _stored(plan: Plan, refs: tuple[Any, ...], at: tuple[Any, ...], x: jax.Array, mask: jax.Array) -> jax.Array:
    """Puts the key or value `[D]` of a token into its slot: float32 `[D]` as it will be read there."""
    d = jnp.arange(plan.shape[0])
    wide = x.astype(jnp.float32)
    if not plan.coded:
        plgpu.store(refs[0].at[*at, d], x, mask=mask & (d < plan.head_dim))
        return wide
    largest = jnp.max(jnp.abs(wide), axis=0)
    dtype = refs[0].dtype
    scale = jnp.where(largest == 0, jnp.float32(1), largest / TOP[dtype.name])
    ratio = wide / scale
    codes = jnp.floor(ratio + jnp.float32(0.5)).astype(dtype) if dtype == jnp.int8 else ratio.astype(dtype)
    plgpu.store(refs[0].at[*at, d], codes, mask=mask & (d < plan.head_dim))
    plgpu.store(refs[1].at[*at], scale, mask=mask)
    return codes.astype(jnp.float32) * scale


def _kernel(plan: Plan, positions_ref: Any, cos_ref: Any, sin_ref: Any, row_ref: Any, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, (of_keys, of_values, (out_ref, sums_ref), of_new_keys, of_new_values) = plan.tile, _by_purpose(plan, refs)
    share, kv_head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    position = positions_ref[row]
    d = jnp.arange(plan.shape[0])
    inside, half = d < plan.head_dim, plan.head_dim // 2
    angle = jnp.where(d < half, d, d - half)
    cos, sin = (plgpu.load(ref.at[row, angle], mask=inside, other=jnp.float32(0)) for ref in (cos_ref, sin_ref))

    # The new token. Columns that are no query head's repeat the last one's.
    columns = [part * plan.shape[1] + jnp.arange(plan.shape[1]) for part in range(plan.parts)]
    heads = [kv_head * plan.group + jnp.minimum(column, plan.group - 1)[None, :] for column in columns]
    queries = [_turned(plan, row_ref, row, head, d[:, None], cos[:, None], sin[:, None]) for head in heads]
    key = _turned(plan, row_ref, row, plan.heads + kv_head, d, cos, sin)
    at = row_ref.at[row, plan.heads + plan.kv_heads + kv_head, d]
    value = plgpu.load(at, mask=inside, other=jnp.zeros((), row_ref.dtype))
    stored = (share == 0) & (position >= 0) & (position < plan.capacity)
    at = row, kv_head, jnp.clip(position, 0, plan.capacity - 1)
    key = _stored(plan, of_new_keys, at, key, stored)
    value = _stored(plan, of_new_values, at, value, stored)

    # Its share of the slots before.
    end = jnp.clip(position, 0, plan.capacity)
    begin = jnp.int32(0) if plan.window is None else jnp.clip(position - (plan.window - 1), 0, end)
    blocks = jax.lax.div(end - begin + (tile.block - 1), jnp.int32(tile.block))
    a_share = jax.lax.div(blocks + (tile.shares - 1), jnp.int32(tile.shares))
    last = jnp.minimum((share + 1) * a_share, blocks)
    slots = Slots(plan, of_keys, of_values, (row, kv_head), begin, end, share * a_share, last)
    if tile.rows:
        found = by_lanes(slots, [query.astype(jnp.float32).reshape(d.size) for query in queries])
    else:
        found = [by_tensor_cores(slots, queries[0])]

    # Its own slot comes last, so that the first loads of the cache do not wait for the product with its key.
    for column, query, (largest, total, attended) in zip(columns, queries, found, strict=True):
        score = capped(plan, jnp.sum(query.astype(jnp.float32) * key[:, None], axis=0))
        score = jnp.where(stored, score, jnp.float32(NOTHING))
        now = jnp.maximum(largest, score)
        weight, faded = jnp.where(stored, jnp.exp2(score - now), jnp.float32(0)), jnp.exp2(largest - now)
        total = total * faded + weight
        attended = attended * faded[None, :] + weight[None, :] * value[:, None]
        total = jnp.where(total == 0, jnp.float32(1), total)  # an empty share: nothing / 1
        real, head = column < plan.group, kv_head * plan.group + column
        at = out_ref.at[share, row, head[None, :], d[:, None]]
        plgpu.store(at, (attended / total[None, :]).astype(out_ref.dtype), mask=inside[:, None] & real[None, :])
        plgpu.store(sums_ref.at[share, row, head], now + jnp.log2(total), mask=real)


def _join_kernel(head_dim: int, shares: int, parts_ref: Any, sums_ref: Any, out_ref: Any) -> None:
    """A row's head from its shares, whose softmaxes have the sums `2^sums`."""
    row, head = pl.program_id(0), pl.program_id(1)
    share, d = jnp.arange(pl.next_power_of_2(shares)), jnp.arange(pl.next_power_of_2(head_dim))
    sums = plgpu.load(sums_ref.at[share, row, head], mask=share < shares, other=jnp.float32(NOTHING))
    weights = jnp.exp2(sums - jnp.max(sums, axis=0))
    mask = (share < shares)[:, None] & (d < head_dim)[None, :]
    parts = plgpu.load(parts_ref.at[share[:, None], row, head, d[None, :]], mask=mask, other=jnp.float32(0))
    joined = jnp.sum(weights[:, None] * parts, axis=0) / jnp.sum(weights, axis=0)
    plgpu.store(out_ref.at[row, head, d], joined.astype(out_ref.dtype), mask=d < head_dim)


def _joined(attended: jax.Array, sums: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """Shares `[S, B, H, D]` and their sums `[S, B, H]` -> `[B, H, D]`."""
    shares, batch, heads, head_dim = attended.shape
    return pl.pallas_call(
        functools.partial(_join_kernel, head_dim, shares),
        grid=(batch, heads),
        out_shape=result((batch, heads, head_dim), dtype, attended, sums),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="qjax_join_shares",
    )(attended, sums)


def decode_attention(
    row: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sms: int = 132,
    smem: int = 99 * 1024,
    config: dict[str, int] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Attention of one new token a row, which joins the cache.

    Args:
      scale: of the scores.
      softcap: scores become `cap * tanh(score / cap)`.
      window: slots that a token sees, its own included; None for all.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have.
      config: fields of `Tile`; empty takes `tile_for` the shape.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `([B, H * D] in row's dtype, keys, values)`, and the scales where there are some.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    heads = row.shape[1] // head_dim - 2 * kv_heads
    tile = Tile(**config) if config else tile_for(heads, keys.shape, row.dtype, keys.dtype, sms, smem)
    plan = Plan(heads, kv_heads, head_dim, capacity, scale, softcap, window, key_scale is not None, tile, interpret)
    caches = tuple(a for a in (keys, values, key_scale, value_scale) if a is not None)
    operands = positions, cos, sin, row.reshape(batch, -1, head_dim), *caches
    shape, whole = (tile.shares, batch, heads, head_dim), tile.shares == 1
    attended, sums, *caches = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(tile.shares, kv_heads, batch),
        out_shape=(
            result(shape, row.dtype if whole else jnp.float32, *operands),
            result(shape[:3], jnp.float32, *operands),
            *(result(a.shape, a.dtype, *operands) for a in caches),
        ),
        input_output_aliases={4 + i: 2 + i for i in range(len(caches))},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="qjax_decode_attention",
    )(*operands)
    out = attended[0] if whole else _joined(attended, sums, row.dtype, interpret)
    return out.reshape(batch, -1), *caches
