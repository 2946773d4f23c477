"""Kernels of quantized layers as params: drawn in float and quantized by `init`, read back by `apply`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from qjax.errors import QTensorError
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.linen.boxes import boxed_like, unboxed
from qjax.qtensor import QTensor, is_qtensor


def _where(layer: nn.Module, name: str) -> str:
    return "/".join((*layer.path, name))


def stored_qtensor(layer: nn.Module, name: str) -> QTensor | None:
    """A layer's param if it is there and is a QTensor, without its boxes.

    The initializer gives nothing to compare shapes with: Flax would compare the arrays of a QTensor with the shape of
    the float kernel.
    """
    if layer.scope is None or not is_qtensor(layer.scope.get_variable("params", name)):
        return None
    return layer.param(name, lambda *_: None)


def quantized_param(layer: Any, name: str, init: Callable[..., Any], shape: tuple[int, ...], use: KernelUse) -> QTensor:
    """The kernel of one of our layers.

    Args:
      layer: bound; with `scheme` and `param_dtype`.
      name: of the param.
      init: draws the float kernel, perhaps boxed: `init(key, shape, dtype)`.
      shape: of the float kernel.
      use: its contracted and stacked axes.

    Raises:
      QTensorError: a stored param of another shape, or one that is not quantized.
      QuantizeError: as `qjax.quantize_array`, naming the path.
    """
    where = _where(layer, name)
    if layer.has_variable("params", name):
        w = stored_qtensor(layer, name)
        if w is None or w.shape != shape:
            got = f"shape {w.shape}" if w is not None else "a float array, which qjax.quantize makes a QTensor of"
            raise QTensorError(f"{where}: the layer wants a QTensor of shape {shape}; the params hold {got}")
        return w

    def draw(key: jax.Array) -> QTensor:
        kernel = init(key, shape, layer.param_dtype)
        return boxed_like(kernel, quantize_kernel(unboxed(kernel), layer.scheme, use, where=where), where=where)

    return layer.param(name, draw)
