"""Scales that are trained with the weights which they round: learned step size quantization (LSQ).

    q  = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),    w' = q * s
    dw'/dw = 1 where w / s lies between the outermost codes, else 0
    dw'/ds = (q - w / s where it does, else q) * g,    g = 1 / sqrt(n * (2^(b-1) - 1)) with n weights to a scale

Source: Esser et al., Learned Step Size Quantization (2020), equations 1 to 3 and section 2.2, with a scale a group.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.dequantize import expand_blocks
from qjax.errors import QuantizeError
from qjax.flax_kernel import KernelUse, layout_of, quantize_kernel
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import reduce_blocks
from qjax.quotient import quotient
from qjax.schemes import Scheme


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def rounded(
    kernel: jax.Array, scale: jax.Array, scheme: Scheme, use: KernelUse, where: str, partial: bool, pieces: int
) -> jax.Array:
    """A kernel as it reads after quantization by `scale`, with the gradients above; arguments of `fake_quant`."""
    w = quantize_kernel(kernel, scheme, use, where=where, partial_groups=partial, k_pieces=pieces, scale=scale)
    return w.dequantize(kernel.dtype)


def _forward(kernel: jax.Array, scale: jax.Array, *static: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rounded(kernel, scale, *static), (kernel, scale)


def _backward(
    scheme: Scheme, use: KernelUse, where: str, partial: bool, pieces: int, saved: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kernel, scale = saved
    layout = layout_of(where, kernel.shape, use)

    def rows(a: jax.Array) -> jax.Array:
        """`[*stack, N, K]`."""
        one = functools.partial(layout.matrix, index=())
        for _ in layout.stack:
            one = jax.vmap(one)
        return one(a).swapaxes(-1, -2)

    w, back = jax.vjp(rows, kernel.astype(jnp.float32))
    g, (n, k) = rows(gradient.astype(jnp.float32)), w.shape[-2:]
    half = 2 ** (scheme.bits - 1)
    ratio = quotient(w, expand_blocks(scale.astype(jnp.float32), n, k, scheme.block))
    inside = (ratio > -half) & (ratio < half - 1)
    q = jnp.clip(jnp.round(ratio), -half, half - 1)
    share = 1 / math.sqrt((scheme.block[0] or n) * (scheme.block[1] or k) * (half - 1))
    of_scale = share * reduce_blocks(g * jnp.where(inside, q - ratio, q), scheme.block, jnp.sum)
    (of_kernel,) = back(jnp.where(inside, g, 0))
    return of_kernel.astype(kernel.dtype), of_scale.astype(scale.dtype)


rounded.defvjp(_forward, _backward)


def scale_of(w: QTensor, where: str) -> jax.Array:
    """The scales of a weight, float32, to be trained.

    Raises:
      QuantizeError: a weight whose values are more than a code times a scale.
    """
    if not w.scheme.is_plain or w.input_perm is not None or w.input_scale is not None:
        raise QuantizeError(f"{where}: {w!r} is no weight of symmetric integers in the order of its kernel")
    assert isinstance(w.scale, jax.Array), w.scheme
    return w.scale.astype(jnp.float32)


def scales_of(params: Any) -> dict[str, jax.Array]:
    """The scales of quantized linen params, to begin training from: those of `qjax.quantize`, or of a recipe.

    Args:
      params: a tree with QTensors of symmetric integers; `{"params": ...}` too.

    Returns:
      Path of a kernel -> float32 `[*stack, N, G]`, as `qjax.fake_quantize` and `qjax.quantize` take them.

    Raises:
      QuantizeError: a QTensor of another kind, or with columns in another order, or scaled ones; no QTensor at all.
    """
    from flax.core import meta

    inner = params["params"] if isinstance(params.get("params"), Mapping) else params
    leaves = jax.tree_util.tree_flatten_with_path(meta.unbox(inner), is_leaf=is_qtensor)[0]
    paths = {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in leaves}
    return collected({path: leaf for path, leaf in paths.items() if is_qtensor(leaf)})


def collected(weights: Mapping[str, QTensor]) -> dict[str, jax.Array]:
    """`scale_of` each.

    Raises:
      QuantizeError: there is none, and as `scale_of`.
    """
    if not weights:
        raise QuantizeError(f"{dict(weights)}: nothing is quantized here, so there are no scales to begin from")
    return {path: scale_of(w, path) for path, w in weights.items()}


def refuse_unknown(scales: Mapping[str, Any] | None, paths: set[str]) -> None:
    """Raises QuantizeError for scales of what is no kernel to be quantized."""
    unknown = sorted({*(scales or {})} - paths)
    if unknown:
        raise QuantizeError(f"scales of {', '.join(unknown)}: no such kernel is quantized; there are {sorted(paths)}")
