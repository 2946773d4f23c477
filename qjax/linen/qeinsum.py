"""QEinsum: `nn.Einsum` over a quantized kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init

from qjax.linen.param import quantized_param
from qjax.linen.products import einsum_axes, einsum_bias_shape, einsum_layer, einsum_spec
from qjax.schemes import W4A16, Scheme


class QEinsum(nn.Module):
    """An einsum of inputs and a QTensor; argument for argument `nn.Einsum`.

    Attributes:
      shape: of the kernel.
      einsum_str: such as `"BTD,NDH->BTNH"`; here or in the call. Axes of the kernel that inputs and the result have too
        must lead it.
      preferred_element_type: dtype of the result before the bias.
      scheme, backend, precision: as `QDense`.
      use_bias and the rest: as `nn.Einsum`.
    """

    shape: Sequence[int]
    einsum_str: str | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype
    preferred_element_type: Any = None
    scheme: Scheme | str = W4A16()
    backend: str | None = None

    @nn.compact
    def __call__(self, inputs: Any, einsum_str: str | None = None) -> jax.Array:
        """The einsum of `inputs` and the kernel, plus a bias over the kernel's axes in the result.

        Raises:
          QuantizeError: an expression without two operands and a result; a kernel that cannot be quantized.
          QTensorError: params or an expression that do not fit.
          NotImplementedError: shared axes that do not lead the kernel.
        """
        spec = einsum_spec(self, einsum_str)
        shape = tuple(self.shape)
        kernel = quantized_param(self, "kernel", self.kernel_init, shape, einsum_axes(spec))
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, einsum_bias_shape(spec, shape), self.param_dtype)
        return einsum_layer(self, inputs, kernel, bias, spec, self.backend)
