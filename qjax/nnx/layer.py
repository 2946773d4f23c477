"""What the quantized nnx layers share: drawing a kernel, standing in for a Flax layer, dtypes, placing the result."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.errors import QTensorError
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.qtensor import QTensor, is_qtensor
from qjax.schemes import Scheme, as_scheme


class _NoRngs:
    def params(self) -> None:
        """No key."""


NO_RNGS: Any = _NoRngs()  # stands for `nnx.Rngs` where every initializer returns what is already there


def draw_kernel(
    init: Callable[..., Any],
    rngs: Any,
    shape: tuple[int, ...],
    dtype: Any,
    metadata: Mapping[str, Any],
    axes: KernelAxes,
    scheme: Scheme | str,
    *,
    partial_groups: bool,
) -> QParam:
    """A layer's kernel: drawn in float as Flax draws it, then quantized; or the QTensor that `init` returns.

    Raises:
      QTensorError: for a QTensor of another shape or scheme than the layer's.
      QuantizeError: as `qjax.quantize_array`.
    """
    value = init(rngs.params(), shape, dtype)
    if not is_qtensor(value):
        return quantize_param(nnx.Param(value, **metadata), axes, scheme, partial_groups=partial_groups)
    if value.scheme != as_scheme(scheme) or value.shape[len(value.shape) - len(shape) :] != tuple(shape):
        raise QTensorError(f"{value!r} is no kernel of shape {tuple(shape)} and scheme {scheme}")
    return QParam(value, **metadata)


def draw_bias(
    init: Callable[..., Any], rngs: Any, shape: Sequence[int] | None, dtype: Any, metadata: Mapping[str, Any]
) -> Any:
    """A layer's bias, or None for a shape that is None, as an attribute's value."""
    return nnx.data(None) if shape is None else nnx.Param(init(rngs.params(), shape, dtype), **metadata)


def flattened(init: Callable[..., Any], flat_shape: tuple[int, ...]) -> Callable[..., Any]:
    """An initializer that draws in `flat_shape`, so that its fans are those of the matrix, and then reshapes."""

    def reshaped(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        value = init(key, flat_shape, dtype)
        if is_qtensor(value):
            return value
        if isinstance(value, nnx.VariableMetadata):
            value.raw_value = jnp.reshape(value.raw_value, shape)
            return value
        return jnp.reshape(value, shape)

    return reshaped


def stand_in[Layer: nnx.Module](
    cls: type[Layer], layer: nnx.Module, kernel: QParam, *, name: str = "kernel", backend: str | None = None
) -> Layer:
    """A quantized layer with the arguments and the bias of a Flax layer, around a kernel.

    Args:
      cls: a class whose arguments have the names of the Flax layer's attributes.
      layer: of Flax; it is left as it is, and its bias Param is shared.
      kernel: what becomes of its kernel.
      name: of the kernel's attribute.
      backend: as `qjax.matmul`.
    """
    arguments = {a: getattr(layer, a) for a in inspect.signature(cls.__init__).parameters if hasattr(layer, a)}
    arguments |= {f"{name}_init": lambda *_: kernel.get_value(), "scheme": kernel.get_value().scheme}
    make: Callable[..., Layer] = cls
    new = make(**arguments, backend=backend, rngs=NO_RNGS)
    setattr(new, name, kernel)
    return with_bias(new, getattr(layer, "bias", None))


def with_bias(layer: Any, bias: Any) -> Any:
    """The layer with a bias put in: an array, or a Variable, which is then shared; None changes nothing."""
    if bias is not None:
        layer.bias = bias if isinstance(bias, nnx.Variable) else nnx.Param(jnp.asarray(bias))
    return layer


def refuse_custom_product(layer: str, **given: Any) -> None:
    """A user's own dot_general or einsum cannot multiply by packed weights.

    Raises:
      NotImplementedError: naming the layer and the argument.
    """
    for argument, value in given.items():
        if value not in (None, jax.lax.dot_general, jnp.einsum):
            raise NotImplementedError(
                f"{layer}: {argument}={value!r} would replace the quantized product; leave it out"
            )


def promote(promote_dtype: Any, x: Any, w: QTensor, *more: Any, dtype: Any) -> tuple[Any, ...]:
    """x and the arrays in `more` in the dtype that Flax computes in; the weight takes part with its own dtype."""
    x, _, *rest = promote_dtype((x, jnp.zeros((), w.dtype), *more), dtype=dtype)
    return (x, *rest)


def place(y: jax.Array, out_sharding: Any) -> jax.Array:
    """The result as `out_sharding` says, on a mesh of Explicit axes."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
