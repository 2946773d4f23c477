"""QEinsum: `flax.nnx.Einsum` over a quantized kernel."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from qjax.contract import einsum
from qjax.errors import QTensorError
from qjax.nnx.delayed import DelayedScale, delayed_scale, scaled
from qjax.nnx.layer import NO_RNGS, draw_bias, draw_kernel, place, promote, refuse_custom_product, stand_in, with_bias
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.qtensor import QTensor
from qjax.schemes import Scheme


def _subscripts(einsum_str: str) -> tuple[str, str, str]:
    """x's, the kernel's and the result's."""
    left, arrow, out = einsum_str.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        raise QTensorError(f"einsum {einsum_str!r}: two operands and '->' are needed, as in 'bd,dnh->bnh'")
    return (*operands, out)  # type: ignore[return-value]


def einsum_axes(einsum_str: str) -> KernelAxes:
    """Which axes of the kernel are contracted; those that x and the result have too are its stack.

    Raises:
      QTensorError: for an expression without two operands and a result.
      NotImplementedError: where a stacked axis of the kernel is not a leading one.
    """
    x, kernel, out = _subscripts(einsum_str)
    batch = [c for c in kernel if c in x and c in out]
    if list(kernel[: len(batch)]) != batch:
        raise NotImplementedError(
            f"einsum {einsum_str!r}: axes {batch} are stacked and must lead the kernel {kernel!r}"
        )
    contracted = tuple(i - len(kernel) for i, c in enumerate(kernel) if c in x and c not in out)
    return KernelAxes(contracted, len(kernel) - len(batch))


class QEinsum(nnx.Module):
    """An einsum of x with a quantized kernel; argument for argument `nnx.Einsum`.

    Attributes:
      kernel: QParam of a QTensor of `kernel_shape`; more leading axes stack layers.
      delayed: the scale of x where the scheme delays it, or None.
      bias: `nnx.Param` of `bias_shape`, or None.
    """

    kernel: QParam
    delayed: DelayedScale | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        scheme: Scheme | str,
        backend: str | None = None,
        partial_groups: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        promote_dtype: Any = default_promote_dtype,
        einsum_op: Any = jnp.einsum,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Draws the float kernel as `nnx.Einsum` does, and quantizes it over the axes that `einsum_str` contracts.

        Args:
          einsum_str: x, the kernel and the result: `"btd,dnh->btnh"`.
          scheme, backend, partial_groups, kernel_init, precision: as `QLinear`.
          einsum_op: only JAX's own.
          kernel_shape, bias_shape, and the rest: as `nnx.Einsum`.

        Raises:
          QTensorError: for an expression that no kernel can serve.
          QuantizeError, NotImplementedError: as `QLinear`; the latter also where stacked axes do not lead the kernel.
        """
        refuse_custom_product("QEinsum", einsum_op=einsum_op)
        self.einsum_str = einsum_str.replace(" ", "")
        self.kernel_shape = tuple(kernel_shape)
        self.bias_shape = bias_shape
        axes = einsum_axes(einsum_str)
        self.kernel = draw_kernel(
            kernel_init,
            rngs,
            self.kernel_shape,
            param_dtype,
            kernel_metadata,
            axes,
            scheme,
            partial_groups=partial_groups,
        )
        self.delayed = delayed_scale(self.kernel)
        self.bias = draw_bias(bias_init, rngs, bias_shape, param_dtype, bias_metadata)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.einsum_op = einsum_op
        self.preferred_element_type = preferred_element_type
        self.backend = backend

    @classmethod
    def from_qtensor(
        cls,
        einsum_str: str,
        qtensor: QTensor,
        *,
        bias: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        **options: Any,
    ) -> "QEinsum":
        """A layer around a QTensor that is already there.

        Args:
          einsum_str: as the constructor's.
          qtensor: of the kernel's shape, quantized over the axes that `einsum_str` contracts.
          bias: an array or a Variable, which is then shared; its shape is the `bias_shape`.
          dtype, backend, **options: as `QLinear.from_qtensor`.
        """
        options |= dict(scheme=qtensor.scheme, param_dtype=qtensor.dtype, kernel_init=lambda *_: qtensor)
        options |= dict(bias_shape=None if bias is None else bias.shape, dtype=dtype, backend=backend)
        return with_bias(cls(einsum_str, qtensor.shape, **options, rngs=NO_RNGS), bias)

    @classmethod
    def from_einsum(
        cls, layer: nnx.Einsum, scheme: Scheme | str, *, backend: str | None = None, **options: Any
    ) -> "QEinsum":
        """The quantized stand-in of an Einsum, as `QLinear.from_linear`."""
        kernel = quantize_param(layer.kernel, einsum_axes(layer.einsum_str), scheme, **options)
        return stand_in(cls, layer, kernel, backend=backend)

    def __call__(self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """The einsum of `inputs` and the kernel, plus the bias; an `einsum_str` given here goes before the layer's.

        Raises:
          QTensorError: for an expression that contracts other axes than the kernel was quantized over.
        """
        spec = self.einsum_str if einsum_str is None else einsum_str
        w = self.kernel.get_value()
        bias = None if self.bias is None else self.bias[...]
        x, bias = promote(self.promote_dtype, inputs, w, bias, dtype=self.dtype)
        w = scaled(self.delayed, x, w)
        y = place(einsum(spec, x, w, out_dtype=self.preferred_element_type, backend=self.backend), out_sharding)
        return y if bias is None else y + jnp.reshape(bias, self._bias_rows(spec, y.ndim))

    def _bias_rows(self, spec: str, rank: int) -> list[int]:
        """The bias's shape among the result's axes: the kernel's sizes where the kernel has them, else 1."""
        _, kernel, out = _subscripts(spec)
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        before, _, after = out.partition("...")
        dots = [1] * (rank - len(before) - len(after))
        return [*(size.get(c, 1) for c in before), *dots, *(size.get(c, 1) for c in after)]
