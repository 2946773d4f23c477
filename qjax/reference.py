"""The `xla` backend: dequantize in float32, then one float32 dot. Any QTensor, any device; the oracle of kernels.

Error: that of a float32 dot of the exactly dequantized weight, plus one rounding to the output's dtype.
"""

import jax
import jax.numpy as jnp

from qjax.activations import Rows
from qjax.dequantize import rows_of_k
from qjax.qtensor import QTensor


def matmul(x: Rows, w: QTensor, transposed: bool) -> jax.Array:
    """The product in float32.

    Args:
      x: rows `[*stack, M, K]` (`[*stack, M, N]` if transposed); axes of the stack may be 1 and broadcast.
      w: `[*stack, K, N]`, without `input_perm` and `input_scale`.
      transposed: multiply by the weight's transpose: the gradient of x.

    Returns:
      float32 `[*stack, M, N]` (`[*stack, M, K]`).
    """
    rows = rows_of_k(w)
    return jnp.matmul(
        x.dequantize(),
        rows if transposed else rows.swapaxes(-1, -2),
        precision=jax.lax.Precision.HIGHEST,
    )
