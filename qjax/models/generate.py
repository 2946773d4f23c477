"""Prompts -> new tokens: one jitted prefill, one jitted block of decode steps, a host loop over blocks.

Prompts are padded on the right to a power of two and the cache is sized to one, so that few shapes
are ever compiled. Rows are independent: each has its own length, positions and random numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qjax.errors import GenerationError
from qjax.models import collectives
from qjax.models.kv_cache import CODED, KVCache
from qjax.models.llama import Llama
from qjax.models.memory import memory_explained
from qjax.models.prefill import reader_of

SMALLEST_BUCKET = 16
# Steps that the device makes without the host, whose part of a step may be longer than the device's. The last block may
# be longer than what was asked for: a few steps for nothing cost less than compiling a shorter block.
BLOCK = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How to draw a token. Values are traced: changing one compiles nothing."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int | jax.Array = 0,
    cache_dtype: DTypeLike | None = None,
    prompt_activations: str = "scheme",
    callback: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
      model: a Llama, quantized or not.
      prompts: token ids, one sequence a row; lengths may differ.
      max_new_tokens: at most so many new tokens a row.
      temperature: 0 takes the likeliest token; above, logits are divided by it and drawn from.
      top_k: draw from the `top_k` likeliest tokens only.
      top_p: of those, draw from the fewest whose probabilities reach `top_p`.
      stop_tokens: tokens that end a row, and are its last.
      seed: an int or a key of `jax.random`.
      cache_dtype: "int8" or "fp8" hold keys and values of past tokens in 8 bits; the model's dtype by default.
      prompt_activations: "8bit" reads prompts with x in 8 bits by those weights that have a scheme for it and are
        expected to be faster so (`qjax.models.prefill`); "scheme" as the weights' schemes say, in both phases.
      callback: called with (row, token) for each new token, in blocks of up to eight.

    Returns:
      The new tokens of each row, without its prompt.

    Raises:
      GenerationError: an empty or foreign prompt, more tokens than the model has positions, a
        sampling setting out of range; or too little memory, with what would fit.
    """
    rows = _check_prompts(prompts, model.config.vocab_size)
    sampling = _check_sampling(temperature, top_k, top_p, seed)
    kept = _check_cache(cache_dtype, model.dtype)
    longest = _check_lengths(rows, max_new_tokens, model.config.max_positions)
    ids, positions = _pad(rows, min(bucket(longest), model.config.max_positions))
    capacity = min(bucket(longest + max_new_tokens), model.config.max_positions)
    definition, state = nnx.split(model)

    outputs: list[list[int]] = [[] for _ in rows]
    running = set(range(len(rows)))
    stops = frozenset(map(int, stop_tokens))

    def emit(block: jax.Array) -> None:
        for tokens in np.asarray(block).tolist():
            for row, token in enumerate(tokens):
                if row in running:
                    outputs[row].append(token)
                    if callback is not None:
                        callback(row, token)
                    if token in stops:
                        running.discard(row)

    reader = reader_of(state, prompt_activations, ids.size, model.dtype)
    a_row = partial(model.empty_cache, 1, capacity, kept)
    with memory_explained(state, a_row, rows=len(rows), capacity=capacity, coded=kept in CODED.values()):
        first, cache = prefill(definition, reader, ids, positions, sampling, capacity=capacity, cache_dtype=kept)
        block, step, write = first[None], 1, decoder(state)
        while step < max_new_tokens:
            # Dispatched before the host waits for the tokens it continues: the device never idles.
            ahead, cache = write(definition, state, block[-1], cache, sampling, step, count=BLOCK)
            emit(block)
            if not running:
                return outputs
            block, step = ahead, step + BLOCK
        emit(block[: len(block) - (step - max_new_tokens)])
    return outputs


def bucket(length: int) -> int:
    """The next power of two, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _prefill(
    definition: nnx.GraphDef,
    state: nnx.State,
    ids: jax.Array,
    positions: jax.Array,
    sampling: Sampling | None,
    *,
    capacity: int,
    cache_dtype: DTypeLike | None = None,
) -> tuple[jax.Array, KVCache]:
    """Prompts `[B, S]` -> their first new tokens `[B]`, and a cache of `capacity` slots a row."""
    model = nnx.merge(definition, state)
    hidden, cache = model.hidden_states(ids, model.empty_cache(len(ids), capacity, cache_dtype), positions)
    last = jnp.argmax(positions, axis=1)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    return pick(logits, sampling, 0), cache


def _decode(
    definition: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    cache: KVCache,
    sampling: Sampling | None,
    first: int | jax.Array,
    *,
    count: int,
) -> tuple[jax.Array, KVCache]:
    """Tokens `[B]` -> the next ones `[count, B]`, steps `first` on, and the cache with all but the last.

    Takes over the cache's memory.
    """

    def one(i: jax.Array, before: tuple[jax.Array, KVCache, jax.Array]) -> tuple[jax.Array, KVCache, jax.Array]:
        tokens, cache, new = before
        logits, cache = nnx.merge(definition, state)(tokens[:, None], cache)
        tokens = pick(logits[:, 0], sampling, first + i)
        # No slice is updated here: that would be a copy that XLA keeps out of the step's CUDA graph.
        return tokens, cache, jnp.where(jnp.arange(count)[:, None] == i, tokens, new)

    _, cache, new = jax.lax.fori_loop(0, count, one, (tokens, cache, jnp.zeros((count, len(tokens)), jnp.int32)))
    return new, cache


prefill = jax.jit(_prefill, static_argnums=0, static_argnames=("capacity", "cache_dtype"))
decode = jax.jit(_decode, static_argnums=0, static_argnames="count", donate_argnums=3)


_decode_on_gpus = jax.jit(
    _decode, static_argnums=0, static_argnames="count", donate_argnums=3, compiler_options=collectives.OPTIONS
)


def decoder(state: nnx.State) -> jax.stages.Wrapped:
    """`decode`, as it is to be compiled for the devices of a model."""
    return _decode_on_gpus if collectives.in_graph(state) else decode


def pick(logits: jax.Array, sampling: Sampling | None, step: int | jax.Array) -> jax.Array:
    """The next token of each row: `[B, V]` -> int32 `[B]`; the likeliest one without `sampling`."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    fold = partial(jax.random.fold_in, jax.random.fold_in(sampling.key, step))
    keys = jax.vmap(fold)(jnp.arange(logits.shape[0]))
    scaled = logits / sampling.temperature
    draw = jax.vmap(jax.random.categorical)
    if sampling.top_k is None and sampling.top_p is None:
        return draw(keys, scaled).astype(jnp.int32)
    order = jnp.argsort(scaled, axis=-1, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    if sampling.top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    if sampling.top_p is not None:
        likelihood = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(likelihood, axis=-1) - likelihood
        ranked = jnp.where(likelier < sampling.top_p, ranked, -jnp.inf)
    chosen = draw(keys, ranked)[:, None]
    return jnp.take_along_axis(order, chosen, axis=-1)[:, 0].astype(jnp.int32)


def _check_prompts(prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array, vocab_size: int) -> list[np.ndarray]:
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise GenerationError("no prompts; expected at least one sequence of token ids")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            raise GenerationError(
                f"prompt {i}: expected a non-empty sequence of token ids, got shape "
                f"{list(row.shape)} of {row.dtype}; one prompt is a batch of one: [ids]"
            )
        if row.min() < 0 or row.max() >= vocab_size:
            raise GenerationError(f"prompt {i}: token ids {row.min()} to {row.max()}; allowed: 0 to {vocab_size - 1}")
    return rows


def _check_lengths(rows: list[np.ndarray], max_new_tokens: int, positions: int) -> int:
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens}; expected at least 1")
    longest, row = max((row.size, i) for i, row in enumerate(rows))
    if longest + max_new_tokens > positions:
        room = max(positions - longest, 0)
        raise GenerationError(
            f"prompt {row}: {longest} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"model's {positions} positions; room for new tokens: {room}"
        )
    return longest


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | jax.Array
) -> Sampling | None:
    if not 0 <= temperature < math.inf:
        raise GenerationError(f"temperature={temperature}; expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise GenerationError(f"top_k={top_k}; expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise GenerationError(f"top_p={top_p}; expected above 0 and at most 1, or None")
    if temperature == 0:
        return None
    return Sampling(
        key=seed if isinstance(seed, jax.Array) else jax.random.key(seed),
        temperature=jnp.float32(temperature),
        top_k=None if top_k is None else jnp.int32(top_k),
        top_p=None if top_p is None else jnp.float32(top_p),
    )


def _check_cache(dtype: DTypeLike | None, own: np.dtype) -> np.dtype:
    found = own if dtype is None else np.dtype(CODED.get(str(dtype), dtype))
    if found not in (own, *CODED.values()):
        raise GenerationError(f"cache_dtype={found}; a cache is int8, fp8 or as the model's activations, {own}")
    return found


def _pad(rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions `[B, length]`; position -1 is padding."""
    ids = np.zeros((len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        ids[i, : row.size] = row
        positions[i, : row.size] = np.arange(row.size)
    return ids, positions
