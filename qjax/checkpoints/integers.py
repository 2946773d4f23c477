"""A QTensor of integers as other tools see it: codes in the order of x, groups by index, zero points unsigned."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qjax.dequantize import codes
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor


@dataclass(frozen=True)
class Integers:
    """Integer codes with groups along K.

    Attributes:
      bits: of a code.
      group_size: elements of K that share a scale, None for all of them.
      symmetric: whether the zero point is the middle everywhere.
      codes: uint8 `[N, K]`, unsigned, column k meeting column k of x.
      scale: `[N, G]` in the QTensor's dtype.
      zero_point: uint8 `[N, G]`.
      g_idx: int32 `[K]`, the group of each column; None where they are in order, as those of one group are.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    g_idx: np.ndarray | None


def refuse(w: QTensor, where: str, found: Mapping[str, bool], written: str) -> None:
    """Raises CheckpointError where one of `found`, or what no other tool has a place for, is so.

    Args:
      w: the weight.
      where: its module's name.
      found: what a format has no place for, in words -> whether the weight has it.
      written: what the format holds instead.
    """
    always = {
        "stacked layers": bool(w.stack_shape),
        "scales that are quantized": isinstance(w.scale, QTensor),
        "an input_scale (the recipe's unfolded=skip makes none)": w.input_scale is not None,
    }
    if has := ", ".join(what for what, is_so in {**found, **always}.items() if is_so):
        raise CheckpointError(f"{where}: {w.scheme} has {has}; {written} are written, and format=qjax holds all")


def integers(w: QTensor, where: str) -> Integers:
    """The parts of a QTensor, its order of inputs undone; one scale of the whole tensor is repeated for each row.

    Raises:
      CheckpointError: what other tools have no place for: another format, blocks over rows, stacks, zero points that
        are no integers, scales of x; named with what it is.
    """
    scheme = w.scheme
    rows, size = scheme.block
    refused = {
        f"{scheme.weight} weights": scheme.format.kind != "int",
        "activations that are quantized (format=compressed-tensors has a place)": scheme.activation is not None,
        f"blocks of {rows or 'all'} rows": rows != 1 and scheme.block != (None, None),
        "zero points that are no integers": w.zero_point is not None and np.dtype(w.zero_point.dtype).kind != "i",
    }
    refuse(w, where, refused, "integer weights in groups of K")
    stored = np.asarray(codes(w))
    shift = 128 if scheme.bits == 8 else 0
    middle = 2 ** (scheme.bits - 1)
    scale = np.asarray(w.scale)
    zero = np.full(scale.shape, middle) if w.zero_point is None else np.asarray(w.zero_point).astype(np.int16) + shift
    unsigned = stored.view(np.uint8) ^ np.uint8(shift)
    if zero.min() < 0 or zero.max() >= 2**scheme.bits:
        raise CheckpointError(f"{where}: zero points {zero.min()} to {zero.max()} are no codes of {scheme.bits} bits")
    g_idx = None
    if w.input_perm is not None:
        place = np.argsort(np.asarray(w.input_perm))  # where column k of x is stored
        unsigned = unsigned[:, place]
        g_idx = None if size is None else (place // size).astype(np.int32)
    scale, zero = (np.broadcast_to(each, (len(stored), each.shape[1])) for each in (scale, zero.astype(np.uint8)))
    return Integers(scheme.bits, size, w.zero_point is None, unsigned, scale, zero, g_idx)
