"""Attention of one new token as data, for the suites that run it: operands at random, and what is right in float64.

`tests/pallas_kernels` interprets the kernel on any machine, `tests/gpu` runs it on the one that is there.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

TOP = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of caches of codes


def operands(
    heads: int, kv_heads: int, head_dim: int, capacity: int, dtype: str, positions: Sequence[int], seed: int = 0
) -> tuple[jax.Array, ...]:
    """`(row, cos, sin, positions, keys, values)` as `decode_attention` takes them."""
    key = iter(jax.random.split(jax.random.key(seed), 4))
    batch, cache = len(positions), (len(positions), kv_heads, capacity, head_dim)
    row = jax.random.normal(next(key), (batch, (heads + 2 * kv_heads) * head_dim)).astype(dtype)
    angle = jax.random.uniform(next(key), (batch, head_dim // 2)) * 6
    keys, values = (jax.random.normal(next(key), cache).astype(dtype) for _ in range(2))
    return row, jnp.cos(angle), jnp.sin(angle), jnp.array(positions, jnp.int32), keys, values


def exact(row, cos, sin, positions, keys, values, *, scale, softcap=None, window=None, own=None):
    """The same in float64, keys and queries rounded once they are turned; `own`: the cache as the token left it."""
    batch, kv_heads, capacity, head_dim = keys.shape
    dtype, heads = row.dtype, row.shape[1] // head_dim - 2 * kv_heads
    cos, sin, wide, keys, values = (np.asarray(a, np.float64) for a in (cos, sin, row, keys, values))
    wide = wide.reshape(batch, -1, head_dim)
    a, b = np.split(wide[:, : heads + kv_heads], 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    turned = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    turned = np.asarray(jnp.asarray(turned, jnp.float32).astype(dtype), np.float64)
    out = np.zeros((batch, heads, head_dim))
    for i, position in enumerate(np.asarray(positions)):
        if 0 <= position < capacity:
            new = turned[i, heads:], wide[i, heads + kv_heads :]
            keys[i, :, position], values[i, :, position] = new if own is None else (a[i, :, position] for a in own)
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            j = head * kv_heads // heads
            scores = scale * keys[i, j, first : position + 1] @ turned[i, head]
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values[i, j, first : position + 1] / weights.sum()
    return out.reshape(batch, -1), keys, values


def coded(a: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Codes of keys or values, and their scales."""
    scale = jnp.max(jnp.abs(a), axis=-1).astype(jnp.float32) / TOP[kind]
    ratio = a.astype(jnp.float32) / scale[..., None]
    return (jnp.round(ratio) if kind == "int8" else ratio).astype(kind), scale


def steps_off(codes: jax.Array, scale: jax.Array, exact: np.ndarray) -> float:
    """How many steps of its codes a cache is off what it stands for; 0.5 is a code to the nearest."""
    one = np.asarray(scale, np.float64)[..., None]
    step = one if codes.dtype == jnp.int8 else np.maximum(np.abs(exact) / 8, one * 2.0**-9)
    return float((np.abs(np.asarray(codes, np.float64) * one - exact) / step).max())
