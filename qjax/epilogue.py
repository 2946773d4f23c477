"""What may follow a product before it is rounded: `residual + activation(y + bias)`, in float32."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def apply_epilogue(
    y: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    residual: jax.Array | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """`(residual + activation(y + bias))` rounded once.

    Args:
      y: float32 `[..., N]`.
      bias: broadcastable against y, or None.
      activation: a key of `ACTIVATIONS`, or None.
      residual: shaped like y, or None.
      out_dtype: of the result.
    """
    y = y.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
