"""What follows a product and is no kernel's own: plain JAX, which XLA fuses with whatever comes next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def finish(
    y: jax.Array,
    out_dtype: Any,
    *,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`residual + activation(global_scale * y + bias)` in float32, rounded once.

    Args:
      y: `[M, N]`; global_scale: `[]` or `[N]`; bias: `[N]`; residual: `[M, N]`; any but y may be None.
      out_dtype: of the result.
      activation: elementwise, on float32.
    """
    y = y.astype(jnp.float32)
    if global_scale is not None:
        y = y * global_scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = activation(y)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
