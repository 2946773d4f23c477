"""A weight for a mesh that its file was not made for: blocks of scales and padding that each shard has whole.

Smaller blocks with scales repeated, and codes padded shard by shard, say the same to the bit.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.packed import Packed
from qjax.dequantize import block_scales
from qjax.layouts import BLOCK
from qjax.qtensor import QTensor, k_pieces


def fitted(w: QTensor, parts: Mapping[str, int]) -> QTensor:
    """The weight of a reader with blocks and padding that `parts["n"]` by `parts["k"]` equal shards don't cut.

    Double-quantized scales that would be cut become float32. Where the parts are not equal nothing is changed: whoever
    places the weight says so.
    """
    sizes = {"n": w.out_features, "k": w.in_features}
    if any(sizes[axis] % parts[axis] for axis in sizes):
        return w
    shards = {axis: sizes[axis] // parts[axis] for axis in sizes}
    if isinstance(w.scale, QTensor) and max(parts.values()) > 1:
        scale: Any = np.asarray(block_scales(w))
        w = dataclasses.replace(w, scale=scale, scheme=dataclasses.replace(w.scheme, nested=None))
    block = w.scheme.block
    smaller = tuple(
        size if size is None or parts[axis] == 1 else math.gcd(size, shards[axis])
        for axis, size in zip("nk", block, strict=True)
    )
    if smaller != block:
        w = _with_blocks(w, (smaller[0], smaller[1]))
    packed: Any = w.packed
    if isinstance(packed, Packed) and w.is_packed and parts["k"] > 1 and shards["k"] % BLOCK:
        cut: Any = packed.cut(parts["k"])
        w = dataclasses.replace(w, packed=cut, k_piece=k_pieces(w.in_features, w.scheme.bits, parts["k"]))
    return w


def _with_blocks(w: QTensor, block: tuple[int | None, int | None]) -> QTensor:
    """Blocks that divide the ones there are."""

    def repeat(array: Any) -> Any:
        for axis, old, new, size in zip((-2, -1), w.scheme.block, block, (w.out_features, w.in_features), strict=True):
            if old is not None and new is not None and old != new:
                array = np.take(array, np.arange(-(-size // new)) * new // old, axis=axis)
        return array

    assert not isinstance(w.scale, QTensor), "made plain before"
    zero_point = None if w.zero_point is None else repeat(w.zero_point)
    scheme = dataclasses.replace(w.scheme, block=block)
    return dataclasses.replace(w, scale=repeat(w.scale), zero_point=zero_point, scheme=scheme)
