"""Contractions of x with a QTensor that are more than `x @ w`: einsum and dot_general, by moving axes around `matmul`.

A QTensor knows which of its kernel's axes are contracted; an expression that contracts others cannot be served from its
packed form and says so.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import QTensorError
from qjax.matmul import matmul
from qjax.qtensor import QTensor

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def kernel_axes(w: QTensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Positions in `w.shape` of its stack, contracted and output axes, each in the order of storage."""
    stack = len(w.stack_shape)
    inputs, outputs = len(w.in_shape or (1,)), len(w.out_shape or (1,))
    order = w.axes or tuple(range(inputs + outputs))
    place = {stored: stack + position for position, stored in enumerate(order)}
    return (
        tuple(range(stack)),
        tuple(place[i] for i in range(inputs)),
        tuple(place[inputs + i] for i in range(outputs)),
    )


def dot_general(x: jax.Array, w: QTensor, dimension_numbers: DimensionNumbers, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` with a QTensor on the right.

    Args:
      x: float array.
      w: of any logical shape.
      dimension_numbers: `((x_contract, w_contract), (x_batch, w_batch))`, axes of `x` and of `w.shape`. w's contracted
        axes must be those that were contracted when it was quantized, and its batch axes all of its stack.
      **options: `out_dtype` and `backend`, as `qjax.matmul`.

    Returns:
      `[*batch, *free axes of x, *free axes of w]`.

    Raises:
      QTensorError: for axes that w's packed form cannot contract.
    """
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    stack, inputs, outputs = kernel_axes(w)
    if sorted(w_contract) != sorted(inputs) or sorted(w_batch) != sorted(stack):
        raise QTensorError(
            f"a weight of shape {w.shape} was quantized to contract axes {inputs} over batch axes {stack}; "
            f"asked for {tuple(w_contract)} over {tuple(w_batch)}"
        )
    batch = [x_batch[list(w_batch).index(axis)] for axis in stack]
    contract = [x_contract[list(w_contract).index(axis)] for axis in inputs]
    for x_axis, w_axis in zip((*batch, *contract), (*stack, *inputs), strict=True):
        if x.shape[x_axis] != w.shape[w_axis]:
            raise QTensorError(f"x {tuple(x.shape)} axis {x_axis} does not meet w {w.shape} axis {w_axis}")
    free = [axis for axis in range(x.ndim) if axis not in (*batch, *contract)]
    rows = x.transpose(*batch, *free, *contract)
    rows = rows.reshape(*rows.shape[: len(batch) + len(free)], math.prod(x.shape[a] for a in contract))
    y = matmul(rows, w, **options)
    # Batch axes come in the order asked for; free axes of w in the order of its logical shape.
    y = y.reshape(*y.shape[:-1], *(w.shape[axis] for axis in outputs))
    lead = [stack.index(axis) for axis in w_batch]
    middle = range(len(batch), len(batch) + len(free))
    tail = [len(batch) + len(free) + outputs.index(axis) for axis in sorted(outputs)]
    return y.transpose(*lead, *middle, *tail)


@dataclasses.dataclass(frozen=True)
class _Spec:
    x: str
    w: str
    out: str


def _parse(spec: str, x_rank: int, w_rank: int) -> _Spec:
    """An einsum of two operands with an explicit result; an ellipsis in x and the result is spelled out."""
    left, arrow, out = spec.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        raise QTensorError(f"einsum {spec!r}: two operands and '->' are needed")
    x, w = operands
    if "..." in w:
        raise QTensorError(f"einsum {spec!r}: no ellipsis in the weight's subscripts")
    if ("..." in x) != ("..." in out):
        raise QTensorError(f"einsum {spec!r}: an ellipsis stands in x and in the result, or in neither")
    spare = [c for c in map(chr, range(ord("A"), ord("z") + 1)) if c.isalpha() and c not in spec]
    dots = "".join(spare[: max(0, x_rank - len(x.replace("...", "")))]) if "..." in x else ""
    x, out = x.replace("...", dots), out.replace("...", dots)
    for name, text, rank in (("x", x, x_rank), ("the weight", w, w_rank)):
        if len(text) != rank:
            raise QTensorError(f"einsum {spec!r}: {name} has {rank} axes and {len(text)} subscripts")
        if len(set(text)) != len(text):
            raise QTensorError(f"einsum {spec!r}: {name} repeats a subscript")
    unknown = set(out) - set(x) - set(w)
    if unknown or len(set(out)) != len(out):
        raise QTensorError(f"einsum {spec!r}: the result's subscripts {out!r} repeat, or stand in no operand")
    summed = (set(x) ^ set(w)) - set(out)
    if summed:
        raise QTensorError(
            f"einsum {spec!r}: {', '.join(sorted(summed))} stands in one operand only and is summed away"
        )
    return _Spec(x, w, out)


def einsum(spec: str, x: jax.Array, w: QTensor, **options: Any) -> jax.Array:
    """`jnp.einsum(spec, x, w)` with a QTensor on the right.

    Args:
      spec: two operands and a result, such as `"btd,dnh->btnh"`; x may have an ellipsis. The subscripts of w that are
        contracted must be those that were when it was quantized.
      x: float array.
      w: of logical shape as in the spec.
      **options: `out_dtype` and `backend`, as `qjax.matmul`.

    Raises:
      QTensorError: for a spec that is malformed, or that w's packed form cannot serve.
    """
    s = _parse(spec, x.ndim, w.ndim)
    shared = [c for c in s.w if c in s.x]
    batch = [c for c in shared if c in s.out]
    contract = [c for c in shared if c not in s.out]
    numbers = (
        ([s.x.index(c) for c in contract], [s.w.index(c) for c in contract]),
        ([s.x.index(c) for c in batch], [s.w.index(c) for c in batch]),
    )
    y = dot_general(x, w, numbers, **options)
    order = [*batch, *(c for c in s.x if c not in shared), *(c for c in s.w if c not in shared)]
    return jnp.transpose(y, [order.index(c) for c in s.out])
