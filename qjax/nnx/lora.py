"""Adapters beside quantized layers (QLoRA): `add_lora` puts them there, `merge_lora` rounds them into the weights."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qjax.errors import RuleError
from qjax.nnx.convert import become
from qjax.nnx.qlinear import LINEAR_AXES, QLinear
from qjax.nnx.qlora_linear import QLoRALinear
from qjax.nnx.qparam import quantize_param
from qjax.schemes import Scheme


def _layers[Layer: nnx.Module](module: nnx.Module, kind: type[Layer]) -> Iterator[tuple[str, Layer]]:
    for path, layer in list(nnx.iter_modules(module, graph=True)):
        if type(layer) is kind:
            yield "/".join(map(str, path)), layer


def add_lora[M: nnx.Module](module: M, rank: int, *, layers: str = ".*", rngs: nnx.Rngs) -> M:
    """Gives quantized layers adapters, in place: `y = x @ w + x @ a @ b`, a drawn as Flax draws it, b zero.

    The weights stay as they are and need no gradient; those of a and b pass through the products and, on the way down,
    through the products by the transposed codes. Train `nnx.LoRAParam`s alone:
    `nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)` and `nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))`.
    Source: Dettmers et al., QLoRA (2023), equation 5, with the factor taken into b.

    Args:
      module: any nnx module with `QLinear`s.
      rank: columns of a.
      layers: a regular expression that has to match all of a layer's path: `.*/(q|v)_proj`.
      rngs: for a; float32 params, computed with in the layer's dtype.

    Returns:
      The module itself.

    Raises:
      RuleError: an expression that matches no QLinear, or a rank below 1.
      NotImplementedError: stacked layers.
    """
    found = [(path, layer) for path, layer in _layers(module, QLinear) if re.fullmatch(layers, path)]
    if not found or rank < 1:
        known = [path for path, _ in _layers(module, QLinear)]
        raise RuleError(f"rank={rank}, layers={layers!r}: matches {len(found)} quantized layers; there are {known}")
    for path, layer in found:
        w = layer.kernel.get_value()
        if w.stack_shape:
            raise NotImplementedError(f"{path}: holds stacked layers {w.shape}; give an adapter to layers that are not")
        base = QLinear.from_qtensor(w, bias=layer.bias, dtype=layer.dtype, backend=layer.backend)
        base.kernel, base.delayed = layer.kernel, layer.delayed
        base.promote_dtype, base.preferred_element_type = layer.promote_dtype, layer.preferred_element_type
        lora = nnx.LoRA(layer.in_features, rank, layer.out_features, dtype=layer.dtype or w.dtype, rngs=rngs)
        become(layer, QLoRALinear(base, lora))
    return module


def merge_lora[M: nnx.Module](module: M, scheme: Scheme | str | None = None) -> M:
    """Adds adapters to the weights beside them, in place, and rounds the sums to nearest.

    Rounding anew loses what of the adapters lies below half a step, so measure both: a model that keeps its adapters
    is exact. Layers whose weights carry a static scale of x keep it.

    Args:
      module: any nnx module with `QLoRALinear`s.
      scheme: of the sums; None for that of each weight.

    Returns:
      The module itself, without adapters.

    Raises:
      RuleError: there are none.
      QuantizeError: as `qjax.nnx.quantize`.
    """
    found = list(_layers(module, QLoRALinear))
    if not found:
        raise RuleError(f"{type(module).__name__} has no QLoRALinear to merge")
    for path, layer in found:
        base: Any = layer.base
        w = base.kernel.get_value()
        adapter = jnp.matmul(layer.lora.lora_a[...], layer.lora.lora_b[...], precision="highest")
        total = (w.dequantize(jnp.float32) + adapter).astype(w.dtype)
        partial = w.scheme.block[1] is not None and w.in_features % w.scheme.block[1] != 0
        made = quantize_param(
            nnx.Param(total), LINEAR_AXES, scheme or w.scheme, where=path, partial_groups=partial
        ).get_value()
        static = w.act_scale if made.scheme.is_static else None
        base.kernel = base.kernel.replace(dataclasses.replace(made, act_scale=static))
        become(layer, base)
    return module
