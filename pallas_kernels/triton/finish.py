"""Partial sums -> result: the sum over shares of K and the epilogue, in plain JAX, so that XLA makes one fusion of it
and of whatever elementwise work follows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def finish_sums(
    partial: jax.Array,
    out_dtype: jnp.dtype,
    *,
    global_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array] | None,
    residual: jax.Array | None,
) -> jax.Array:
    """`residual + activation(global_scale * sum(partial) + bias)`, in float32, rounded once.

    Args:
      partial: float32 `[shares, M, N]`.
      out_dtype: of the result.
      global_scale: `[]` or `[N]`; bias: `[N]`; residual: `[M, N]`; any may be None.
      activation: elementwise, or None.
    """
    y = partial.sum(axis=0)
    if global_scale is not None:
        y = y * global_scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = activation(y)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
