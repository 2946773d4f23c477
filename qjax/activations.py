"""Quantization of x on its way into a product: array -> `Rows`. Formulas in `qjax.schemes`."""

import dataclasses

import jax
import jax.numpy as jnp

from qjax.formats import FORMATS
from qjax.quotient import quotient
from qjax.schemes import Activation

BLOCK_K = 128  # `granularity="block"`: one scale for each 128 elements of a token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What meets a weight: rows of K.

    Attributes:
      values: `[..., K]`: x itself, or its codes (int8, float8_e4m3fn).
      scale: float32 `[..., C]` of codes, C = 1 or ceil(K/128); None where `values` is x itself.
    """

    values: jax.Array
    scale: jax.Array | None = None

    def dequantize(self) -> jax.Array:
        """float32 `[..., K]`."""
        values = self.values.astype(jnp.float32)
        return values if self.scale is None else values * _spread(self.scale, values.shape[-1])


def _spread(scale: jax.Array, k: int) -> jax.Array:
    """A scale for each element of K: `[..., C]` -> `[..., K]`; one of a row stays, and broadcasts."""
    count = scale.shape[-1]
    if count == 1:
        return scale
    # `jnp.repeat` would gather, and it refuses an axis that is cut over an Explicit mesh.
    wide = jnp.broadcast_to(scale[..., None], (*scale.shape, BLOCK_K))
    wide = wide.reshape(*scale.shape[:-1], count * BLOCK_K)
    return wide if k == wide.shape[-1] else wide[..., :k]


def quantize_rows(
    x: jax.Array, activation: Activation | None, act_scale: jax.Array | None, k_over: tuple[str, ...] = ()
) -> Rows:
    """Quantizes x as the scheme asks.

    Args:
      x: float `[..., K]`.
      activation: None leaves x alone.
      act_scale: float32, broadcastable against `x[..., :1]`: the scale where `activation.mode` is static.
      k_over: inside a shard_map, the mesh axes that K is cut over: a token's scale is that of all its parts.

    Returns:
      Rows; a scale of a whole tensor is repeated for each row, so that rows can be cut anywhere.
    """
    if activation is None:
        return Rows(x)
    form = FORMATS[activation.format]
    wide = x.astype(jnp.float32)
    if activation.mode == "static":
        assert act_scale is not None, "checked in qjax.matmul"
        given = act_scale.astype(jnp.float32)
        scale = jnp.broadcast_to(given, (*x.shape[:-1], 1))
        ratio = wide * (1 / given)  # one division, not one for each element
    else:
        amax = _amax(wide, activation)
        scale = quotient(jax.lax.pmax(amax, k_over) if k_over else amax, form.maximum)
        scale = jnp.where(scale == 0, 1.0, scale)
        ratio = quotient(wide, _spread(scale, x.shape[-1]))
    if form.kind == "int":
        return Rows(jnp.clip(jnp.round(ratio), -128, 127).astype(form.dtype), scale)
    codes = jnp.clip(ratio, -form.maximum, form.maximum).astype(form.dtype)
    # Without a barrier XLA leaves out a rounding to 8 bits that a conversion to a wider float follows.
    return Rows(jax.lax.optimization_barrier(codes), scale)


def _amax(x: jax.Array, activation: Activation) -> jax.Array:
    """Largest magnitude a scale covers, `[..., C]`; 0 where there are no elements."""
    magnitude = jnp.abs(x)
    if activation.granularity == "tensor":
        amax = jnp.max(magnitude, initial=0.0)
        return jnp.broadcast_to(amax, (*x.shape[:-1], 1))
    if activation.granularity == "block":
        columns = -(-x.shape[-1] // BLOCK_K)
        magnitude = jnp.pad(magnitude, [(0, 0)] * (x.ndim - 1) + [(0, columns * BLOCK_K - x.shape[-1])])
        magnitude = magnitude.reshape(*x.shape[:-1], columns, BLOCK_K)
        return jnp.max(magnitude, axis=-1, initial=0.0)
    return jnp.max(magnitude, axis=-1, keepdims=True, initial=0.0)
