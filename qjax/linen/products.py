"""What a linen layer computes with a quantized kernel: Flax's rules for axes and dtypes around one product.

Each function takes the layer for its attributes, Flax's own or ours, which have the same names. `precision` asks for
nothing, since products accumulate in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.module import merge_param

from qjax.contract import dot_general, einsum
from qjax.errors import QuantizeError
from qjax.flax_kernel import KernelUse
from qjax.linen.delayed import with_delayed_scale
from qjax.lookup import look_up
from qjax.matmul import matmul
from qjax.qtensor import QTensor


def refuse_dot_general(layer: Any) -> None:
    """Raises where the user brought a product of his own, which cannot read packed codes.

    Raises:
      NotImplementedError: naming the layer's path.
    """
    for name in ("dot_general", "dot_general_cls"):
        given = getattr(layer, name, None)
        if given is not None and given is not jax.lax.dot_general:
            raise NotImplementedError(
                f"{'/'.join(layer.path)}: {name}={given!r} with a quantized kernel; leave this layer alone with the "
                f"rule ({'/'.join(layer.path)!r}, None), or leave {name} away"
            )


def _promote(layer: Any, inputs: Any, w: QTensor, bias: Any) -> tuple[jax.Array, Any]:
    """Inputs and bias as Flax promotes them beside a kernel of w's dtype; an array without elements stands for w."""
    inputs, _, bias = layer.promote_dtype(inputs, jnp.zeros((0,), w.dtype), bias, dtype=layer.dtype)
    return inputs, bias


def dense(layer: Any, inputs: Any, w: QTensor, bias: Any, backend: str | None) -> jax.Array:
    """`nn.Dense`: `[..., K]` by `[K, N]`, plus a bias `[N]`."""
    refuse_dot_general(layer)
    inputs, bias = _promote(layer, inputs, w, bias)
    return matmul(inputs, with_delayed_scale(layer, inputs, w), bias, backend=backend)


def dense_general(layer: Any, inputs: Any, w: QTensor, bias: Any, backend: str | None) -> jax.Array:
    """`nn.DenseGeneral`: contracts `axis` over leading `batch_dims`; kernel `[*batch, *contracted, *features]`."""
    refuse_dot_general(layer)
    inputs, bias = _promote(layer, inputs, w, bias)
    axis, batch, _ = general_axes(layer, inputs.ndim)
    use = general_use(len(axis), len(batch))
    w = with_delayed_scale(layer, inputs, w)
    y = dot_general(inputs, w, ((axis, use.contracted), (batch, use.stacked)), backend=backend)
    if bias is None:
        return y
    lead = [inputs.shape[a] if a in batch else 1 for a in range(inputs.ndim) if a not in axis]
    return y + bias.reshape(*lead, *bias.shape[len(batch) :])


def general_axes(layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Contracted and batch axes of a DenseGeneral's inputs, and its features, as Flax reads them.

    Raises:
      QuantizeError: batch axes that do not lead.
    """
    axis, batch, features = (
        tuple(v) if isinstance(v, tuple | list) else (v,) for v in (layer.axis, layer.batch_dims, layer.features)
    )
    batch = tuple(sorted(a % rank for a in batch))
    if batch != tuple(range(len(batch))):
        raise QuantizeError(f"batch_dims={layer.batch_dims} must be consecutive leading dimensions starting from 0")
    return tuple(sorted(a % rank for a in axis)), batch, features


def general_use(axis: int, batch: int) -> KernelUse:
    """What a DenseGeneral over so many axes and batch axes does with those of its kernel."""
    return KernelUse(tuple(range(batch, batch + axis)), tuple(range(batch)))


def einsum_spec(layer: Any, einsum_str: str | None) -> str:
    """The expression of an Einsum, given to the layer or to the call.

    Raises:
      QuantizeError: not two operands and an explicit result.
    """
    spec = merge_param("einsum_str", layer.einsum_str, einsum_str).replace(" ", "")
    if "->" not in spec or spec.count(",") != 1:
        raise QuantizeError(f"einsum {spec!r}: two operands and an explicit '->' are needed")
    return spec


def einsum_axes(spec: str) -> KernelUse:
    """What an expression does with the axes of its second operand."""
    operands, out = spec.split("->")
    x, w = operands.split(",")
    both = [c for c in w if c in x]
    return KernelUse(tuple(w.index(c) for c in both if c not in out), tuple(w.index(c) for c in both if c in out))


def einsum_bias_shape(spec: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an Einsum's bias: the kernel's axes in the order of the result."""
    operands, out = spec.split("->")
    w = operands.split(",")[1]
    return tuple(kernel[w.index(c)] for c in out if c in w)


def einsum_layer(layer: Any, inputs: Any, w: QTensor, bias: Any, spec: str, backend: str | None) -> jax.Array:
    """`nn.Einsum`: the expression, plus a bias over the kernel's axes in the result."""
    inputs, bias = _promote(layer, inputs, w, bias)
    w = with_delayed_scale(layer, inputs, w)
    y = einsum(spec, inputs, w, out_dtype=layer.preferred_element_type, backend=backend)
    if bias is None:
        return y
    operands, out = spec.split("->")
    letters = operands.split(",")[1]
    out = out.replace("...", "." * (y.ndim - len(out.replace("...", ""))))
    return y + bias.reshape([w.shape[letters.index(c)] if c in letters else 1 for c in out])


def embed(layer: Any, inputs: jax.Array, w: QTensor) -> jax.Array:
    """`nn.Embed`: rows of the table, those alone dequantized.

    Raises:
      QuantizeError: inputs that are no integers.
    """
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise QuantizeError(f"{'/'.join(layer.path)}: inputs of dtype {inputs.dtype}; an embedding takes integers")
    if layer.num_embeddings == 1:  # Flax broadcasts the only row, whatever the index
        inputs = jnp.zeros_like(inputs)
    (rows,) = layer.promote_dtype(look_up(w, inputs), dtype=layer.dtype, inexact=False)
    return rows


def attend(layer: Any, query: jax.Array, w: QTensor, backend: str | None) -> jax.Array:
    """`nn.Embed.attend`: `query @ table.T`, which is the product that the table is stored for."""
    query, _ = layer.promote_dtype(query, jnp.zeros((0,), w.dtype), dtype=layer.dtype)
    return matmul(query, with_delayed_scale(layer, query, w), backend=backend)
