"""QLinearGeneral: `flax.nnx.LinearGeneral` over a quantized kernel."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from qjax.contract import dot_general as contract
from qjax.errors import QTensorError
from qjax.nnx.delayed import DelayedScale, delayed_scale, scaled
from qjax.nnx.layer import (
    NO_RNGS,
    draw_bias,
    draw_kernel,
    flattened,
    place,
    promote,
    refuse_custom_product,
    stand_in,
    with_bias,
)
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.qtensor import QTensor
from qjax.schemes import Scheme


def linear_general_axes(n_in: int, n_out: int) -> KernelAxes:
    """Of a kernel `[*stack, *batch, *in_features, *out_features]` with that many of the last two."""
    return KernelAxes(tuple(range(-n_in - n_out, -n_out)), n_in + n_out)


def _as_tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


class QLinearGeneral(nnx.Module):
    """A contraction over several axes with a quantized kernel; argument for argument `nnx.LinearGeneral`.

    Attributes:
      kernel: QParam of a QTensor `[*batch, *in_features, *out_features]`; more leading axes stack layers.
      delayed: the scale of x where the scheme delays it, or None.
      bias: `nnx.Param` `[*batch, *out_features]`, or None.
    """

    kernel: QParam
    delayed: DelayedScale | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        scheme: Scheme | str,
        backend: str | None = None,
        partial_groups: bool = False,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = MappingProxyType({}),
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        precision: Any = None,
        promote_dtype: Any = default_promote_dtype,
        dot_general: Any = None,
        dot_general_cls: Any = None,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Draws the float kernel as `nnx.LinearGeneral` does, and quantizes it; a group runs over all input features.

        Args:
          scheme, backend, partial_groups, kernel_init, precision, dot_general, dot_general_cls: as `QLinear`.
          in_features, out_features, axis, batch_axis, and the rest: as `nnx.LinearGeneral`.

        Raises:
          QTensorError: for `axis` that does not fit `in_features`, or a gap in `batch_axis`.
          QuantizeError, NotImplementedError: as `QLinear`.
        """
        refuse_custom_product("QLinearGeneral", dot_general=dot_general, dot_general_cls=dot_general_cls)
        self.in_features = _as_tuple(in_features)
        self.out_features = _as_tuple(out_features)
        self.axis = _as_tuple(axis)
        self.batch_axis: FrozenDict[int, int] = FrozenDict(batch_axis)
        self._check_axes()
        batch = tuple(self.batch_axis.values())
        shape, bias_shape = (*batch, *self.in_features, *self.out_features), (*batch, *self.out_features)
        # Flax draws a matrix, so that its fans are those of all features.
        matrix = (math.prod((*batch, *self.in_features)), math.prod(self.out_features))
        draw, axes = flattened(kernel_init, matrix), linear_general_axes(len(self.in_features), len(self.out_features))
        self.kernel = draw_kernel(
            draw, rngs, shape, param_dtype, kernel_metadata, axes, scheme, partial_groups=partial_groups
        )
        draw = flattened(bias_init, (math.prod(bias_shape),))
        self.delayed = delayed_scale(self.kernel)
        self.bias = draw_bias(draw, rngs, bias_shape if use_bias else None, param_dtype, bias_metadata)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.dot_general_cls = dot_general_cls
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.backend = backend

    def _check_axes(self) -> None:
        if len(self.in_features) != len(self.axis):
            raise QTensorError(f"in_features={self.in_features} and axis={self.axis} have different lengths")
        if set(self.batch_axis) != set(range(len(self.batch_axis))):
            raise QTensorError(f"batch_axis={dict(self.batch_axis)}: batch axes are 0, 1, ... without a gap")

    @classmethod
    def from_qtensor(
        cls,
        qtensor: QTensor,
        *,
        axis: int | Sequence[int] | None = None,
        bias: Any = None,
        dtype: Any = None,
        backend: str | None = None,
        **options: Any,
    ) -> "QLinearGeneral":
        """A layer around a QTensor that is already there.

        Args:
          qtensor: `[*batch, *in_features, *out_features]`.
          axis: of x, to contract; default its last ones.
          bias, dtype, backend, **options: as `QLinear.from_qtensor`.
        """
        inputs = qtensor.in_shape or (qtensor.in_features,)
        outputs = qtensor.out_shape or (qtensor.out_features,)
        options |= dict(use_bias=bias is not None, param_dtype=qtensor.dtype, kernel_init=lambda *_: qtensor)
        options |= dict(scheme=qtensor.scheme, dtype=dtype, backend=backend)
        options |= dict(axis=tuple(range(-len(inputs), 0)) if axis is None else axis)
        options |= dict(batch_axis=dict(enumerate(qtensor.stack_shape)))
        return with_bias(cls(inputs, outputs, **options, rngs=NO_RNGS), bias)

    @classmethod
    def from_linear(
        cls, linear: nnx.LinearGeneral, scheme: Scheme | str, *, backend: str | None = None, **options: Any
    ) -> "QLinearGeneral":
        """The quantized stand-in of a LinearGeneral, as `QLinear.from_linear`."""
        axes = linear_general_axes(len(linear.in_features), len(linear.out_features))
        return stand_in(cls, linear, quantize_param(linear.kernel, axes, scheme, **options), backend=backend)

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Contracts `axis`: `[*batch, ..., *in_features]` (in any order) -> `[*batch, ..., *out_features]`."""
        w = self.kernel.get_value()
        bias = None if self.bias is None else self.bias[...]
        x, bias = promote(self.promote_dtype, inputs, w, bias, dtype=self.dtype)
        # Flax meets the kernel's input axes with x's in ascending order, whatever the order in `axis`.
        axis = sorted(a % x.ndim for a in self.axis)
        batch = sorted(a % x.ndim for a in self.batch_axis)
        inner = range(len(batch), len(batch) + len(axis))
        numbers = ((axis, tuple(inner)), (batch, tuple(range(len(batch)))))
        w = scaled(self.delayed, x, w)
        y = contract(x, w, numbers, out_dtype=self.preferred_element_type, backend=self.backend)
        y = place(y, out_sharding)
        if bias is None:
            return y
        free = [x.shape[a] if a in batch else 1 for a in range(x.ndim) if a not in axis]
        return y + jnp.reshape(bias, (*free, *self.out_features))
