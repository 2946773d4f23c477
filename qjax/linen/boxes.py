"""Boxes of partition names (`nn.with_partitioning`, `nn.with_logical_partitioning`) around the arrays of a QTensor.

One box around a whole QTensor would give every array in it the kernel's names, and they have other axes. So each array
gets a box of its own: the tools of Flax that read, unbox, or (under `nn.scan`) slice boxes need to know nothing.
"""

from typing import Any

import jax
from absl import logging
from flax.core import meta
from jax.sharding import PartitionSpec

from qjax.contract import kernel_axes
from qjax.qtensor import QTensor
from qjax.sharding import specs


def is_box(leaf: Any) -> bool:
    """For `is_leaf=`: whether Flax boxed this param."""
    return isinstance(leaf, meta.AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array in a box, without the sharding constraint that `meta.unbox` would apply."""
    return leaf.value if isinstance(leaf, meta.Partitioned) else meta.unbox(leaf)


def boxed_like(leaf: Any, w: QTensor, *, where: str) -> QTensor:
    """`w`, its arrays boxed as the kernel in `leaf` was; itself where that had no box.

    Where several axes of a kernel make up K or N, the name of the first counts and the others are dropped: an array cut
    less than it could be.

    Args:
      leaf: the float kernel, perhaps in an `nn.Partitioned` or `nn.LogicallyPartitioned`.
      w: what it was quantized to.
      where: the path that errors name.

    Raises:
      NotImplementedError: for any other kind of box.
    """
    if not is_box(leaf):
        return w
    if not isinstance(leaf, meta.Partitioned):
        raise NotImplementedError(
            f"{where}: boxed in {type(leaf).__name__}; nn.Partitioned and nn.LogicallyPartitioned can be quantized"
        )
    names = [*leaf.names, *(None,) * (w.ndim - len(leaf.names))]
    _, inputs, outputs = kernel_axes(w)
    later = [axis for axis in (*inputs[1:], *outputs[1:]) if names[axis] is not None]
    if later:
        logging.info("%s: of names %s, those of axes %s are dropped", where, tuple(names), later)
    spec = PartitionSpec(*(None if axis in later else name for axis, name in enumerate(names)))

    def box(spec: PartitionSpec, array: jax.Array) -> meta.Partitioned:
        return leaf.replace(value=array, names=tuple(_name(entry) for entry in spec))

    return jax.tree.map(box, specs(w, spec, where=where), w, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _name(entry: Any) -> Any:
    return entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry
