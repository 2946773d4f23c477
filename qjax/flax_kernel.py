"""A Flax kernel of any rank -> QTensor: which axes are contracted, which are stacked layers, and how they are stored.

Stacked layers are quantized one by one into the result, and a kernel that is cut over a mesh is gathered a layer at a
time, so that float never takes more than one layer beside the result.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.errors import QuantizeError
from qjax.partition import entries
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array, refuse_shape
from qjax.schemes import Scheme
from qjax.sharding import shardings


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """What a layer does with the axes of its kernel; those in neither field are outputs.

    Attributes:
      contracted: axes that meet x (of an embedding: its features, which meet a query).
      stacked: axes over which layers are stacked.
    """

    contracted: tuple[int, ...]
    stacked: tuple[int, ...] = ()


def _positions(where: str, shape: Sequence[int], axes: Sequence[int], what: str) -> tuple[int, ...]:
    rank = len(shape)
    if any(not -rank <= a < rank for a in axes) or len({a % rank for a in axes}) != len(axes):
        raise QuantizeError(f"{where}: {what}={tuple(axes)} is no set of axes of shape {tuple(shape)}")
    return tuple(a % rank for a in axes)


def _arrange(where: str, shape: Sequence[int], use: KernelUse) -> tuple[tuple[int, ...], ...]:
    """Stacked, contracted and output axes.

    Raises:
      QuantizeError: for axes that overlap or leave no output.
      NotImplementedError: for stacked axes that do not lead.
    """
    contracted = _positions(where, shape, use.contracted, "axis")
    stacked = tuple(sorted(_positions(where, shape, use.stacked, "stacked")))
    outputs = tuple(a for a in range(len(shape)) if a not in (*contracted, *stacked))
    if 0 in shape:
        raise QuantizeError(f"{where}: shape {tuple(shape)} holds no weights")
    if set(contracted) & set(stacked) or not contracted or not outputs:
        raise QuantizeError(
            f"{where}: axis={contracted}, stacked={stacked} of shape {tuple(shape)}: no axis may be both, "
            "and one has to be contracted and one left for outputs"
        )
    if stacked != tuple(range(len(stacked))):
        raise NotImplementedError(
            f"{where}: layers are stacked over axes {stacked} of shape {tuple(shape)}; a QTensor is sliced over "
            "leading axes only: stack with variable_axes={'params': 0}"
        )
    return stacked, contracted, outputs


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: QTensor, layer: QTensor, index: tuple[int, ...]) -> QTensor:
    return jax.tree.map(lambda s, a: s.at[index].set(a), stack, layer)


def _stack_up(shape: tuple[int, ...], one: Callable[[tuple[int, ...]], QTensor]) -> QTensor:
    """`one(index)` for every index of `shape`, each written into the stack before the next is made."""
    stack: QTensor | None = None
    for index in np.ndindex(*shape):
        layer = one(index)
        if stack is None:
            stack = jax.tree.map(lambda a: jnp.zeros((*shape, *a.shape), a.dtype), layer)
        # Float16 scales widen where a layer of the stack needs float32 ones.
        stack = jax.tree.map(lambda s, a: s.astype(jnp.promote_types(s.dtype, a.dtype)), stack, layer)
        stack = _put(stack, layer, index)
    assert stack is not None, shape
    return stack


def shards_of_k(mesh: Mesh, spec: PartitionSpec, shape: Sequence[int], use: KernelUse) -> int:
    """Over how many devices a kernel of `shape` is cut along its first contracted axis."""
    return math.prod(mesh.shape[name] for name in entries(spec, len(shape))[use.contracted[0]])


def home_of(kernel: Any) -> tuple[Mesh, PartitionSpec] | None:
    """The mesh that a kernel is cut over, and how; None where each device has all of it, and inside a trace."""
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return (sharding.mesh, sharding.spec) if any(entries(sharding.spec, kernel.ndim)) else None


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """How a Flax kernel of any rank is a stack of matrices `[K, N]`.

    Attributes:
      stack: shape of the axes over which layers are stacked.
      in_shape, out_shape: the contracted axes and the outputs.
      order: the layer's axes as `(*in_shape, *out_shape)` has them.
    """

    stack: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def is_natural(self) -> bool:
        """Whether the contracted axes come before the outputs, each in its order."""
        return self.order == tuple(sorted(self.order))

    def matrix(self, kernel: Any, index: tuple[int, ...]) -> Any:
        """One layer as `[K, N]`."""
        layer = kernel[index] if index else kernel
        if not self.is_natural:
            layer = layer.transpose(self.order)
        return layer.reshape(math.prod(self.in_shape), math.prod(self.out_shape))

    def like_kernel(self, w: QTensor) -> QTensor:
        """The QTensor of matrices with the kernel's axes."""
        return dataclasses.replace(
            w,
            in_shape=self.in_shape if len(self.in_shape) > 1 else None,
            out_shape=self.out_shape if len(self.out_shape) > 1 else None,
            axes=None if self.is_natural else tuple(int(a) for a in np.argsort(self.order)),
        )

    def assemble(self, one: Callable[[tuple[int, ...]], QTensor]) -> QTensor:
        """The QTensor of a kernel from those of its layers, asked for by their index, one after another."""
        return self.like_kernel(_stack_up(self.stack, one) if self.stack else one(()))


def layout_of(where: str, shape: Sequence[int], use: KernelUse) -> KernelLayout:
    """The layout of a kernel of `shape`.

    Raises:
      QuantizeError: axes that do not fit the shape.
      NotImplementedError: stacked axes that do not lead.
    """
    stacked, contracted, outputs = _arrange(where, shape, use)
    stack, in_shape, out_shape = (tuple(shape[a] for a in axes) for axes in (stacked, contracted, outputs))
    return KernelLayout(stack, in_shape, out_shape, tuple(a - len(stacked) for a in (*contracted, *outputs)))


def quantize_kernel(
    kernel: Any,
    scheme: Scheme | str,
    use: KernelUse,
    *,
    where: str = "kernel",
    partial_groups: bool = False,
    k_pieces: int = 1,
    scale: jax.Array | None = None,
) -> QTensor:
    """Quantizes a Flax kernel of any rank, stacked layers one by one.

    Args:
      kernel: float array, NumPy's or JAX's. Where it is cut over a mesh, so is the result, with K padded by shards.
      scheme: a `Scheme` or its string.
      use: its contracted and stacked axes.
      where: the path that errors name.
      partial_groups, k_pieces, scale: as `qjax.quantize_array`; the latter `[*stack, N, G]`.

    Returns:
      A QTensor of the kernel's shape, whose K is the contracted axes in their order and whose N is the outputs.

    Raises:
      QuantizeError: axes that do not fit the shape, and what `qjax.quantize_array` refuses.
      ShardingError: a shard that cuts a scale group.
      NotImplementedError: stacked axes that do not lead.
    """
    refuse_shape(where, kernel)
    shape = tuple(kernel.shape)
    layout = layout_of(where, shape, use)
    home = home_of(kernel)
    if home is not None and k_pieces == 1:
        k_pieces = shards_of_k(*home, shape, use)

    def one(index: tuple[int, ...]) -> QTensor:
        layer = kernel[index] if index else kernel
        if home is not None:
            layer = jax.device_put(layer, NamedSharding(home[0], PartitionSpec()))
        return quantize_array(
            layout.matrix(layer, ()),
            scheme,
            where=f"{where}{list(index)}" if index else where,
            partial_groups=partial_groups,
            k_pieces=k_pieces,
            scale=scale[index] if scale is not None and index else scale,
        )

    w = layout.assemble(one)
    return w if home is None else jax.device_put(w, shardings(w, *home, where=where))
