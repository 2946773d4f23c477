"""QLoRALinear: what `flax.nnx.LoRALinear` becomes: its kernel quantized, its adapter as trainable as before."""

from typing import Any

import jax
from flax import nnx

from qjax.nnx.qlinear import QLinear


class QLoRALinear(nnx.Module):
    """`y = base(x) + lora(x)`: QLoRA.

    Attributes:
      base: the quantized Linear.
      lora: the adapter, of `nnx.LoRAParam`.
    """

    def __init__(self, base: QLinear, lora: nnx.LoRA) -> None:
        self.base = base
        self.lora = lora

    def __call__(self, x: Any, out_sharding: Any = None) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`."""
        return self.base(x, out_sharding=out_sharding) + self.lora(x)
