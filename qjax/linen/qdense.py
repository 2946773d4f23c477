"""QDense and QDenseGeneral: `nn.Dense` and `nn.DenseGeneral` over a quantized kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init

from qjax.flax_kernel import KernelUse
from qjax.linen.param import quantized_param
from qjax.linen.products import dense, dense_general, general_axes, general_use
from qjax.schemes import W4A16, Scheme


class QDense(nn.Module):
    """A dense layer whose kernel is a QTensor; argument for argument `nn.Dense`.

    `init` draws the float kernel and quantizes it; the params of a trained `nn.Dense` fit after `qjax.quantize`.

    Attributes:
      scheme: how to quantize, a `Scheme` or its string.
      backend: as `qjax.matmul`.
      precision: accepted and not needed: products accumulate in float32.
      dot_general, dot_general_cls: refused, since they cannot read packed codes.
      features and the rest: as `nn.Dense`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    scheme: Scheme | str = W4A16()
    backend: str | None = None

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        """`[..., K]` -> `[..., features]`.

        Raises:
          QuantizeError: when `init` cannot quantize the kernel, naming its path.
          QTensorError: params that do not fit.
        """
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = quantized_param(self, "kernel", self.kernel_init, shape, KernelUse((0,)))
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return dense(self, inputs, kernel, bias, self.backend)


def _flat(init: Callable[..., Any], flat_shape: tuple[int, ...]) -> Callable[..., Any]:
    """An initializer that draws in `flat_shape`, so that its fans are a matrix's, and then reshapes."""

    def reshaped(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
        value = init(key, flat_shape, dtype)
        if isinstance(value, meta.AxisMetadata):
            return value.replace_boxed(jnp.reshape(value.unbox(), shape))
        return jnp.reshape(value, shape)

    return reshaped


class QDenseGeneral(nn.Module):
    """A dense layer over chosen axes whose kernel is a QTensor; argument for argument `nn.DenseGeneral`.

    Attributes:
      scheme, backend, precision, dot_general, dot_general_cls: as `QDense`.
      features and the rest: as `nn.DenseGeneral`. Groups run along the contracted axes, taken as one.
    """

    features: int | Sequence[int]
    axis: int | Sequence[int] = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    precision: Any = None
    promote_dtype: Callable[..., Any] = promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None
    scheme: Scheme | str = W4A16()
    backend: str | None = None

    @nn.compact
    def __call__(self, inputs: Any) -> jax.Array:
        """`inputs` -> `[*batch, *free axes, *features]`.

        Raises:
          QuantizeError: when `init` cannot quantize the kernel, naming its path; batch axes that do not lead.
          QTensorError: params that do not fit.
        """
        inputs = jnp.asarray(inputs)
        axis, batch, features = general_axes(self, inputs.ndim)
        lead, contracted = (tuple(inputs.shape[a] for a in axes) for axes in (batch, axis))
        flat = (math.prod(lead) * math.prod(contracted), math.prod(features))
        shape = (*lead, *contracted, *features)
        use = general_use(len(axis), len(batch))
        kernel = quantized_param(self, "kernel", _flat(self.kernel_init, flat), shape, use)
        bias = None
        if self.use_bias:
            draw = _flat(self.bias_init, (math.prod(lead) * math.prod(features),))
            bias = self.param("bias", draw, (*lead, *features), self.param_dtype)
        return dense_general(self, inputs, kernel, bias, self.backend)
