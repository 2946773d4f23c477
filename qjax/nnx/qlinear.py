"""QLinear: `flax.nnx.Linear` over a quantized kernel."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from qjax.matmul import matmul
from qjax.nnx.delayed import DelayedScale, delayed_scale, scaled
from qjax.nnx.layer import NO_RNGS, draw_bias, draw_kernel, place, promote, refuse_custom_product, stand_in, with_bias
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.qtensor import QTensor
from qjax.schemes import Scheme

LINEAR_AXES = KernelAxes(contracted=(-2,), rank=2)


class QLinear(nnx.Module):
    """`y = x @ w + b` with w quantized; argument for argument `nnx.Linear`.

    Attributes:
      kernel: QParam of a QTensor `[in_features, out_features]`; a leading axis, as `nnx.vmap` makes, stacks layers.
      delayed: the scale of x where the scheme delays it, or None.
      bias: `nnx.Param` `[out_features]`, or None.
    """

    kernel: QParam
    delayed: DelayedScale | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme | str,
        backend: str | None = None,
        partial_groups: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        dot_general: Any = jax.lax.dot_general,
        promote_dtype: Any = default_promote_dtype,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Draws the float kernel as `nnx.Linear` does, and quantizes it.

        Args:
          scheme: a `qjax.Scheme` or its string.
          backend: as `qjax.matmul`.
          partial_groups: as `qjax.quantize_array`.
          kernel_init: may also return a QTensor of that scheme, which is taken as it is.
          precision: any; codes meet x as they are and sums are float32, which is no less than it asks for.
          dot_general: only JAX's own.
          in_features, out_features, and the rest: as `nnx.Linear`.

        Raises:
          QuantizeError: as `qjax.quantize_array`.
          NotImplementedError: for a `dot_general` of the user's own.
        """
        refuse_custom_product("QLinear", dot_general=dot_general)
        shape = (in_features, out_features)
        self.kernel = draw_kernel(
            kernel_init, rngs, shape, param_dtype, kernel_metadata, LINEAR_AXES, scheme, partial_groups=partial_groups
        )
        bias_shape = (out_features,) if use_bias else None
        self.delayed = delayed_scale(self.kernel)
        self.bias = draw_bias(bias_init, rngs, bias_shape, param_dtype, bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.backend = backend

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, *, bias: Any = None, dtype: Any = None, backend: str | None = None, **options: Any
    ) -> "QLinear":
        """A layer around a QTensor that is already there.

        Args:
          qtensor: `[*stack, in_features, out_features]`.
          bias: `[*stack, out_features]`, an array or a Variable, which is then shared.
          dtype: of the computation.
          backend: as `qjax.matmul`.
          **options: other arguments of the constructor.
        """
        n_in, n_out = qtensor.in_features, qtensor.out_features
        options |= dict(use_bias=bias is not None, param_dtype=qtensor.dtype, kernel_init=lambda *_: qtensor)
        options |= dict(scheme=qtensor.scheme, dtype=dtype, backend=backend)
        return with_bias(cls(n_in, n_out, **options, rngs=NO_RNGS), bias)

    @classmethod
    def from_linear(
        cls, linear: nnx.Linear, scheme: Scheme | str, *, backend: str | None = None, **options: Any
    ) -> "QLinear":
        """The quantized stand-in of a Linear, which is left as it is; the bias Param is shared.

        Args:
          linear: its kernel may have leading stacked axes.
          scheme: a `qjax.Scheme` or its string.
          backend: as `qjax.matmul`.
          **options: `where`, `partial_groups` and `k_pieces`, as `qjax.quantize_array`.
        """
        return stand_in(cls, linear, quantize_param(linear.kernel, LINEAR_AXES, scheme, **options), backend=backend)

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`; dtypes and `out_sharding` as `nnx.Linear`."""
        w = self.kernel.get_value()
        bias = None if self.bias is None else self.bias[...]
        x, bias = promote(self.promote_dtype, inputs, w, bias, dtype=self.dtype)
        out_dtype = self.preferred_element_type
        if out_dtype is not None and bias is not None:
            out_dtype = jnp.promote_types(out_dtype, bias.dtype)
        return place(
            matmul(x, scaled(self.delayed, x, w), bias, out_dtype=out_dtype, backend=self.backend), out_sharding
        )
