"""Projections of the same x become one: q, k and v; gate and up.

A token's step is then four products a layer instead of seven, each long enough to fill the device, and x is read, and
quantized where the scheme asks for it, once for all.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.errors import QTensorError
from qjax.nnx import QLinear
from qjax.qtensor import QTensor, concat_rows, concat_shares
from qjax.sharding import shardings

if TYPE_CHECKING:
    from qjax.models.llama import Llama

MERGED = {"self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")), "mlp": ("gate_up_proj", ("gate_proj", "up_proj"))}


class MergedLinear(nnx.Module):
    """Linears of one x as one: `[..., in]` -> a tuple of `[..., out_i]`.

    Attributes:
      linear: `nnx.Linear` or `QLinear` `[in, sum(out_i)]`, its columns share by share.
      sizes: the `out_i`.
      shares: how many devices its columns are cut over; each has its own range of every `out_i`.
      on_mesh: whether it lies on several devices, cut or whole.
    """

    def __init__(
        self, linear: nnx.Linear | QLinear, sizes: tuple[int, ...], shares: int, *, on_mesh: bool = False
    ) -> None:
        self.linear = linear
        self.sizes = sizes
        self.shares = shares
        self.on_mesh = on_mesh

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The product, taken apart."""
        return self.apart(self.linear(x))

    def apart(self, y: jax.Array) -> tuple[jax.Array, ...]:
        """A product's parts."""
        if self.shares == 1:  # slices and nothing else: whoever joins them again has y itself
            return tuple(jnp.split(y, list(itertools.accumulate(self.sizes[:-1])), axis=-1))
        ranges = y.reshape(*y.shape[:-1], self.shares, -1)
        ends = list(itertools.accumulate(size // self.shares for size in self.sizes))
        return tuple(part.reshape(*y.shape[:-1], -1) for part in jnp.split(ranges, ends[:-1], axis=-1))


class CutEmbed(nnx.Embed):
    """An embedding whose vocabulary is cut over devices.

    A look-up of one token is a slice to XLA, for which it gathers the whole table on each device at every step. One of
    two tokens it leaves: each device looks at its own rows, and what they find is summed.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As Flax's."""
        if inputs.size != 1:
            return super().__call__(inputs, out_sharding)
        twice = jax.lax.optimization_barrier(jnp.concatenate([inputs, inputs]))
        return super().__call__(twice, out_sharding)[:1]


def merge(model: "Llama") -> "Llama":
    """Merges the projections of every layer, in place, one layer's weights at a time; prepares a table that is cut.

    Codes, scales and sums are the same ones. Projections that cannot share a tensor (other schemes, another order of
    inputs, scales that are quantized themselves) stay apart, which is logged. `qjax.save` takes unmerged models only.

    Args:
      model: dense or quantized, on one device or cut over a mesh by output features.

    Returns:
      The model itself.
    """
    apart: dict[str, list[str]] = {}
    for index, layer in enumerate(model.layers):
        for owner, (name, names) in MERGED.items():
            module = getattr(layer, owner)
            if getattr(module, name) is not None:
                continue
            try:
                merged = _merge([getattr(module, part) for part in names])
            except QTensorError as error:
                apart.setdefault(str(error), []).append(f"layers.{index}.{owner}")
                continue
            setattr(module, name, nnx.data(merged))
            for part in names:
                delattr(module, part)
    table = model.embed_tokens
    if type(table) is nnx.Embed and _shares(table.embedding.get_value().T) > 1:
        table.__class__ = CutEmbed  # the same attributes, hence the same paths
    for why, where in apart.items():
        logging.info("%s: projections stay apart: %s", ", ".join(where), why)
    return model


def _merge(linears: list[Any]) -> MergedLinear:
    """One Linear of several.

    Raises:
      QTensorError: they cannot share one.
    """
    first = linears[0]
    if any(type(linear) is not type(first) or linear.dtype != first.dtype for linear in linears):
        raise QTensorError(f"of types {', '.join(type(linear).__name__ for linear in linears)}")
    kernels = [linear.kernel.get_value() for linear in linears]
    biases = [linear.bias.get_value() for linear in linears if linear.bias is not None]
    if biases and len(biases) < len(linears):
        raise QTensorError("some have a bias, others none")
    sizes = tuple(kernel.shape[-1] for kernel in kernels)
    shares = _shares(kernels[0])
    bias = _placed(concat_shares(biases, axis=0, shares=shares), biases[0]) if biases else None
    if isinstance(first, QLinear):
        whole = concat_rows(kernels, shares=shares)
        home = _home(kernels[0].packed)
        if home is not None:
            assert isinstance(home.mesh, Mesh), "arrays at hand lie on devices"
            n, k, *_ = (*home.spec, None, None)
            whole = jax.device_put(whole, shardings(whole, home.mesh, PartitionSpec(k, n)))
        return MergedLinear(
            QLinear.from_qtensor(whole, bias=bias, dtype=first.dtype, backend=first.backend),
            sizes,
            shares,
            on_mesh=home is not None and home.mesh.size > 1,
        )
    kernel = _placed(concat_shares(kernels, axis=1, shares=shares), kernels[0])
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            kernel.shape[0], kernel.shape[1], use_bias=bias is not None, dtype=first.dtype,
            param_dtype=kernel.dtype, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    linear.kernel.set_value(kernel)
    if linear.bias is not None and bias is not None:
        linear.bias.set_value(bias)
    return MergedLinear(linear, sizes, shares)


def _shares(kernel: jax.Array | QTensor) -> int:
    """Over how many devices a kernel `[in, out]` is cut by its output features."""
    home = _home(kernel.packed if isinstance(kernel, QTensor) else kernel)
    if home is None:
        return 1
    axis = (*home.spec, None, None)[0 if isinstance(kernel, QTensor) else 1]
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(home.mesh.shape[name] for name in names)


def _home(array: jax.Array) -> NamedSharding | None:
    """Where an array lies on a mesh; None where there is none, or under a trace, where nobody knows yet."""
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """Where an array of the same axes lies."""
    home = _home(like)
    return array if home is None else jax.device_put(array, home)
