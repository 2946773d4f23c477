"""Integer codes with a scale for each group of K -> QTensor: what GPTQ, AWQ and compressed-tensors have in common.

An act-order index is turned into an order of the inputs: rows of a group become neighbours, and `input_perm` brings x
into that order. Nothing is rounded: codes, scales and zero points keep their values.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints.codes import Codes, Ordered
from qjax.checkpoints.packed import Packed, host_tensor, storage_bits
from qjax.checkpoints.source import ModuleTensors
from qjax.errors import CheckpointError
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class Groups:
    """How K is cut into groups.

    Attributes:
      size: elements of K that share a scale; None is all of them.
      order: int32 `[K]`, the input that belongs to each stored place; None where they are in order.
      columns: which of the file's groups each of ours is; None where they are the same.
    """

    size: int | None
    order: np.ndarray | None = None
    columns: np.ndarray | None = None

    def of(self, scale: np.ndarray) -> np.ndarray:
        """The file's scales or zero points `[N, G]` as one a group of ours."""
        return scale if self.columns is None else scale[:, self.columns]


def group_count(k: int, size: int | None) -> int:
    """Groups along K."""
    return 1 if size is None else -(-k // size)


def groups_of(tensors: ModuleTensors, suffix: str, k: int, size: int | None, *, act_order: str | None) -> Groups:
    """The groups of K, by the index in the tensor `suffix` (int32 `[K]`) where there is one.

    Where the settings ask for one, `act_order` says how, and it has to be there.

    An index that holds one value where there are more groups is one that the writer left unset. Groups that are not all
    of `size` after sorting become smaller ones with scales repeated.
    """
    count = group_count(k, size)
    regular = np.arange(k) // (size or k)
    if suffix not in tensors:
        if act_order is not None and count > 1:
            raise CheckpointError(f"{tensors.where(suffix)}: missing; {act_order}")
        return Groups(size)
    index = tensors.take(suffix, ("int32", "int64"), (k,))
    if np.array_equal(index, regular) or (index.size and index.min() == index.max() and index[0] in (0, -1)):
        return Groups(size)
    bad = np.flatnonzero((index < 0) | (index >= count))
    if bad.size:
        at = int(bad[0])
        raise CheckpointError(
            f"{tensors.where(suffix)}: value {int(index[at])} at [{at}]; allowed are 0 to {count - 1} "
            f"(K={k} in groups of {size or k})"
        )
    order = np.argsort(index, kind="stable").astype(np.int32)
    ordered = index[order]
    unmoved = None if np.array_equal(order, np.arange(k)) else order
    if np.array_equal(ordered, regular):
        return Groups(size, unmoved)
    starts = np.flatnonzero(np.diff(ordered)) + 1
    smaller = math.gcd(k, *starts.tolist())
    return Groups(smaller, unmoved, ordered[::smaller].astype(np.int32))


def int_scheme(bits: int, size: int | None, *, symmetric: bool, scale_dtype: str) -> Scheme:
    """The weight-only scheme of integers in groups of K."""
    make = SCHEMES[f"w{storage_bits(bits)}a16"]
    usual = make(group_size=-1 if size is None else size, symmetric=symmetric)
    if usual.scale_dtype == scale_dtype:
        return usual
    return make(group_size=-1 if size is None else size, symmetric=symmetric, scale_dtype=scale_dtype)


def without_middle(zero_point: np.ndarray | None, bits: int) -> np.ndarray | None:
    """Zero points of a symmetric weight: None where all of them are the middle, as they should be."""
    middle = FORMATS[f"int{storage_bits(bits)}"].zero
    return None if zero_point is None or np.all(zero_point == middle) else zero_point


def int_weight(
    codes: Codes | np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    *,
    bits: int,
    groups: Groups,
) -> QTensor:
    """A QTensor of integer codes.

    Args:
      codes: of the file, in its order; or int8 `[N, K]`, as they are stored.
      scale: `[N, G]` of the file's groups.
      zero_point: int8, like `scale`, in the domain of stored codes; None is the middle.
      bits: of the file's codes.
      groups: of K.
    """
    k = codes.shape[1]
    if isinstance(codes, np.ndarray):
        assert groups.order is None, "codes that are stored as they are keep their order"
        packed: Any = codes
    else:
        packed = Packed(codes if groups.order is None else Ordered(codes, groups.order), bits)
    scheme = int_scheme(bits, groups.size, symmetric=zero_point is None, scale_dtype=scale.dtype.name)
    return host_tensor(
        packed,
        groups.of(scale),
        None if zero_point is None else groups.of(zero_point),
        input_perm=groups.order,
        scheme=scheme,
        k=k,
    )
