"""Rotary position embedding: positions -> rotated queries and keys, with Hugging Face's scalings.

A pair (x[i], x[i + D/2]) is turned by the angle `position * inverse_frequency[i]`; without scaling
`inverse_frequency[i] = theta^(-2i / D)` (Su et al., arXiv 2104.09864, in the "rotate half" order
that Hugging Face's checkpoints are stored for). The scalings are those of transformers'
`modeling_rope_utils.py`; "dynamic" and "longrope" depend on how long the sequence is by now, here
each row's own length, so that a row does not depend on its neighbours in the batch.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Everything that the angles depend on. Static and hashable.

    Attributes:
      kind: "default", "linear", "dynamic", "yarn", "llama3" or "longrope".
      theta: the base.
      dim: of a head; all of it turns.
      max_positions: `max_position_embeddings` of the config.
      factor: by how much the context is stretched (all but "default").
      original_positions: positions of the unstretched model ("yarn", "llama3", "longrope").
      attention_factor: multiplies cos and sin ("yarn", "longrope"; else 1).
      beta_fast, beta_slow, truncate: "yarn": rotations between which it blends; whether the
        bounds are rounded outwards.
      low_freq_factor, high_freq_factor: "llama3": the same in wavelengths.
      short_factor, long_factor: "longrope": a divisor for each frequency.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def angles(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, S, dim/2]`, of int32 positions `[B, S]`; negative is padding."""
    inverse = INVERSE_FREQUENCIES[rope.kind](rope, jnp.max(positions, axis=-1, keepdims=True) + 1)
    angle = positions[..., None].astype(jnp.float32) * inverse[..., None, :]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` `[B, S, heads, dim]` turned by `cos`, `sin` `[B, S, dim/2]`: in float32, then x's dtype."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _powers(rope: Rope) -> np.ndarray:
    """theta^(2i / dim), float32 `[dim/2]`."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return np.float32(rope.theta) ** exponents


def _default(rope: Rope, length: jax.Array) -> jax.Array:
    return jnp.asarray(1 / _powers(rope))


def _linear(rope: Rope, length: jax.Array) -> jax.Array:
    return jnp.asarray(1 / _powers(rope) / np.float32(rope.factor))


def _dynamic(rope: Rope, length: jax.Array) -> jax.Array:
    """NTK-aware: the base grows with the length past `max_positions`. `length` `[B, 1]`."""
    stretched = jnp.maximum(length, rope.max_positions).astype(jnp.float32)
    growth = rope.factor * stretched / rope.max_positions - (rope.factor - 1)
    base = rope.theta * growth ** (rope.dim / (rope.dim - 2))
    return 1 / base ** (jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim)


def _yarn(rope: Rope, length: jax.Array) -> jax.Array:
    """YaRN (arXiv 2309.00071): keep fast frequencies, stretch slow ones, blend between."""

    def bound(rotations: float) -> float:
        wavelengths = math.log(rope.original_positions / (rotations * 2 * math.pi))
        return rope.dim * wavelengths / (2 * math.log(rope.theta))

    low, high = bound(rope.beta_fast), bound(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # the ramp is a step, without a division by zero
    index = np.arange(rope.dim // 2, dtype=np.float32)
    ramp = np.clip((index - low) / (high - low), 0, 1).astype(np.float32)
    kept = 1 / _powers(rope)
    return jnp.asarray(kept / np.float32(rope.factor) * ramp + kept * (1 - ramp))


def _llama3(rope: Rope, length: jax.Array) -> jax.Array:
    """Llama 3.1: wavelengths above original/low are stretched, below original/high kept."""
    kept = 1 / _powers(rope)
    turns = rope.original_positions * kept / np.float32(2 * math.pi)  # over the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = np.clip((turns - rope.low_freq_factor) / span, 0, 1).astype(np.float32)
    return jnp.asarray((1 - smooth) * kept / np.float32(rope.factor) + smooth * kept)


def _longrope(rope: Rope, length: jax.Array) -> jax.Array:
    """LongRoPE (arXiv 2402.13753): searched divisors, one set for short rows, one for long."""
    short, long = (
        1 / (np.asarray(divisors, np.float32) * _powers(rope)) for divisors in (rope.short_factor, rope.long_factor)
    )
    return jnp.where(length > rope.original_positions, long, short)


# Kind -> (rope, row lengths [B, 1]) -> inverse frequencies [dim/2] or [B, dim/2].
INVERSE_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
