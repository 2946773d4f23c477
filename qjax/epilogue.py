"""What may follow a product before it is rounded: `residual + activation(y + bias)`, in float32.

An activation is elementwise, or gated: of a product by two merged weights, `concat_rows([gate, up])`, it makes
`f(gate) * up`, half as many columns.
"""

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

GATED: dict[str, Callable[[jax.Array], jax.Array]] = {
    f"{name}_mul": function for name, function in ACTIVATIONS.items() if name != "relu"
}


def gated(y: jax.Array, activation: str) -> jax.Array:
    """`f(gate) * up` of `[..., 2 N]`, gates first, for a key of `GATED`: `[..., N]`."""
    gate, up = jnp.split(y, 2, axis=-1)
    return GATED[activation](gate) * up


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
      activation: a key of `ACTIVATIONS` or `GATED`, or None.
      residual: shaped like the result, or None.
      out_dtype: of the result.
    """
    y = y.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if activation is not None:
        y = gated(y, activation) if activation in GATED else ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
