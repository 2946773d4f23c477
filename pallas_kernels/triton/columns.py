"""Scales and zero points inside a kernel: columns of an array `[N, groups]`, read as 32-bit words, several to a word.

A tile of one word a row has fewer elements than a program has threads; such a load Triton puts where it is needed. A
tile of narrow entries it would load in one layout, and carry to another through shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

BLOCK = 128


def as_words(a: jax.Array) -> jax.Array:
    """`[R, C]` of 1, 2 or 4 bytes -> uint32 `[R, words]`, zero-padded: the same bytes, which XLA does not copy."""
    per_word = 4 // a.dtype.itemsize
    if per_word == 1:
        return jax.lax.bitcast_convert_type(a, jnp.uint32)
    a = jax.lax.bitcast_convert_type(a, jnp.uint8 if per_word == 4 else jnp.uint16)
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % per_word)))
    return jax.lax.bitcast_convert_type(a.reshape(a.shape[0], -1, per_word), jnp.uint32)


def _value(word: jax.Array, dtype: str) -> jax.Array:
    """The entry at a word's low end, in float32."""
    if dtype == "float32":
        return jax.lax.bitcast_convert_type(word, jnp.float32)
    if dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(word << 16, jnp.float32)
    if dtype == "float16":
        return jax.lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
    if dtype == "int8":
        return (jax.lax.bitcast_convert_type(word << 24, jnp.int32) >> 24).astype(jnp.float32)
    byte = word & 255
    if dtype == "float8_e8m0fnu":
        return jax.lax.bitcast_convert_type(jnp.where(byte == 0, jnp.uint32(1 << 22), byte << 23), jnp.float32)
    assert dtype == "float8_e4m3fn", dtype
    bits = (byte >> 7 << 31) | ((byte & 127) << 20)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) * np.float32(2.0**120)


def read(ref: Any, dtype: str, rows: jax.Array, block: Any, group: int, inside: Any) -> jax.Array:
    """Entries of one block of 128 columns of the weight.

    Args:
      ref: of `as_words`, `[N, words]`.
      dtype: of the entries.
      rows: `[R]`, which rows.
      block: which block.
      group: columns of the weight that share an entry.
      inside: which group of the block's, an int; or int32 `[1, C]` or `[R, C]`, one for each of C results; None where
        the block has one.

    Returns:
      float32 `[R, 1]`, or `[R, C]`.
    """
    bits = 8 * np.dtype(jnp.dtype(dtype)).itemsize
    per_word, per_block = 32 // bits, max(1, BLOCK // group)
    entry = block * per_block if group <= BLOCK else jax.lax.div(block * BLOCK, jnp.int32(group))
    inside = 0 if inside is None else inside
    first = entry >> (per_word.bit_length() - 1)

    def word(i: int) -> jax.Array:
        at = jnp.full_like(rows, jnp.minimum(first + i, ref.shape[1] - 1))
        return plgpu.load(ref.at[rows[:, None], at[:, None]])

    if isinstance(inside, int):
        words = word(inside // per_word)
    else:
        words = word(0)
        for i in range(1, per_block // per_word):
            words = jnp.where(inside // per_word == i, word(i), words)
    if per_word == 1:
        return _value(words, dtype)
    return _value(words >> (((entry + inside) & (per_word - 1)) * bits).astype(jnp.uint32), dtype)
