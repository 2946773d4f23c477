"""The columns of x that eight bits serve badly, taken out and multiplied in x's own type: LLM.int8's decomposition.

    y = quantize(rest) @ w + x[:, O] @ w[O, :]       rest: x with zeros in the columns O
    O = the columns where some row's magnitude reaches the threshold

Shapes are static: there is room for `capacity(K)` columns, the largest go first, those that find no room stay in `rest`
(less exact, never wrong), and unused room is zeros. Which columns go depends on all rows that are multiplied together.
On a mesh of Explicit axes both parts are XLA's to cut, between operands and results that lie as their callers say.
Source: Dettmers et al., LLM.int8 (2022), section 3.2; the threshold there is 6, and columns beyond it are 0.1 % of all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from qjax.partition import mesh_of
from qjax.qtensor import QTensor

_SHARE = 64  # one column of so many may leave
_UNIT = 16  # of tensor cores


def capacity(k: int) -> int:
    """Columns of K that may leave x: a 64th, in multiples of 16."""
    return min(k, -(-k // (_SHARE * _UNIT)) * _UNIT)


class Split(NamedTuple):
    """x in two parts.

    Attributes:
      rest: x with zeros in the columns that left.
      outlier_x: those columns, `[..., C]` in x's dtype, zeros where there are fewer.
      columns: int32 `[*stack, C]`; K where there is none.
    """

    rest: jax.Array
    outlier_x: jax.Array
    columns: jax.Array


def _cut_by_xla[R](f: Callable[..., R], result: Any, *operands: Any) -> R:
    """`f(*operands)`; Explicit axes are Auto ones inside, and what comes out lies by `result`, specs like it."""
    mesh, kind = mesh_of(jax.tree.leaves(operands))
    if kind != AxisType.Explicit:
        return f(*operands)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, out_sharding=result)(*operands)


def split_outliers(x: jax.Array, threshold: float, stack: int = 0, room: int | None = None) -> Split:
    """Takes the columns that reach the threshold out of x.

    Args:
      x: float `[*stack, ..., K]`.
      stack: leading axes that have columns of their own.
      room: how many may leave; `capacity(K)` by default.
    """
    *lead, k = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]
    where: Any = PartitionSpec(*lead, k), PartitionSpec(*lead, None), PartitionSpec(*lead[:stack], None)
    return _cut_by_xla(functools.partial(_split, threshold=threshold, stack=stack, room=room), Split(*where), x)


def _split(x: jax.Array, *, threshold: float, stack: int, room: int | None) -> Split:
    k = x.shape[-1]
    rows = tuple(range(stack, x.ndim - 1))
    largest, columns = jax.lax.top_k(
        jnp.max(jnp.abs(x), axis=rows, initial=0), min(k, capacity(k) if room is None else room)
    )
    columns = jnp.where(largest >= threshold, columns, k)
    left = (columns[..., None] == jnp.arange(k)).any(axis=-2)  # [*stack, K]
    at = columns.reshape(*columns.shape[:-1], *(1,) * len(rows), columns.shape[-1])
    outlier_x = jnp.take_along_axis(x, at, axis=-1, mode="fill", fill_value=0)
    rest = jnp.where(left.reshape(*left.shape[:-1], *(1,) * len(rows), k), jnp.zeros((), x.dtype), x)
    return Split(rest, outlier_x, columns)


def outlier_product(split: Split, w: QTensor, like: jax.Array) -> jax.Array:
    """float32 `x[:, O] @ w[O, :]`, w dequantized to x's dtype there: `[*stack, ..., N]`.

    Args:
      w: `[*stack, K, N]`, codes of 8 bits.
      like: the rest's product, beside which it is to lie.
    """
    return _cut_by_xla(_multiply, jax.typeof(like).sharding.spec, split, w)


def _multiply(split: Split, w: QTensor) -> jax.Array:
    stack, dtype = len(w.stack_shape), split.outlier_x.dtype
    assert not isinstance(w.scale, QTensor) and not w.is_packed and w.scheme.block[0] in (None, 1), w.scheme
    group = w.scheme.block[1] or w.in_features

    def take(a: jax.Array, columns: jax.Array) -> jax.Array:
        """`[*stack, N or 1, C']` at columns, in float32: `[*stack, N or 1, C]`."""
        return jnp.take_along_axis(a, columns[..., None, :], axis=-1, mode="clip").astype(jnp.float32)

    values = take(w.packed, split.columns)  # past K anything: x is zero there
    if w.zero_point is not None:
        values = values - take(w.zero_point, split.columns // group)
    rows = (values * take(w.scale, split.columns // group)).astype(dtype)
    x = split.outlier_x.reshape(*split.outlier_x.shape[:stack], -1, rows.shape[-1])
    precision = jax.lax.Precision.HIGHEST if dtype == np.float32 else None
    y = jnp.matmul(x, rows.swapaxes(-1, -2), precision=precision, preferred_element_type=jnp.float32)
    return y.reshape(*split.outlier_x.shape[:-1], y.shape[-1])
