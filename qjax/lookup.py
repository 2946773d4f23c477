"""Rows of a quantized table: an embedding gathers packed rows and decodes only those."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.dequantize import dequantize
from qjax.qtensor import QTensor


def take_rows(w: QTensor, rows: jax.Array) -> QTensor:
    """Some rows of storage, each an output feature, without decoding any.

    Args:
      w: `[K, N]`, or `[N, K]` as a table.
      rows: integers `[R]` in 0 .. N - 1.

    Returns:
      A QTensor of R rows, each with scales of its own.
    """

    def blocks(a: Any) -> Any:
        """Rows of scales or zero points; one row that serves all stays one."""
        count = a.out_features if isinstance(a, QTensor) else a.shape[0]
        if count == 1:
            return a
        index = rows // (w.scheme.block[0] or 1)
        return take_rows(a, index) if isinstance(a, QTensor) else a[index]

    level = w.global_scale
    return dataclasses.replace(
        w,
        packed=w.packed[rows],
        scale=blocks(w.scale),
        zero_point=None if w.zero_point is None else blocks(w.zero_point),
        global_scale=level[rows] if level is not None and level.ndim else level,
        scheme=dataclasses.replace(w.scheme, block=(1, w.scheme.block[1])),
        out_shape=None,
    )


@jax.custom_vjp
def look_up(table: QTensor, indices: jax.Array) -> jax.Array:
    """Embeddings of `indices`.

    Args:
      table: `[V, D]`, stored by rows of D.
      indices: integers `[...]`; negative ones count from the end.

    Returns:
      `[..., D]` in the table's dtype; NaN for an index outside the table, as `jnp.take` gives.

    Raises:
      TypeError: when a gradient with respect to the table is taken.
    """
    count = table.out_features
    indices = jnp.where(indices < 0, indices + count, indices)
    inside = (indices >= 0) & (indices < count)
    rows = take_rows(table, jnp.where(inside, indices, 0).reshape(-1))
    values = dequantize(dataclasses.replace(rows, axes=(1, 0))).reshape(*indices.shape, table.in_features)
    return jnp.where(inside[..., None], values, jnp.nan)


def _refuse(table: QTensor, indices: jax.Array) -> Any:
    """The forward pass of a gradient, which there is none of."""
    raise TypeError(
        f"a table of {table.scheme} has no gradient for {indices.shape} look-ups: its codes are integers. Train "
        "adapters beside the embedding, or the float table"
    )


def _unreachable(saved: Any, cotangent: Any) -> Any:
    raise AssertionError(f"no forward pass saved {saved} for {cotangent}")


look_up.defvjp(_refuse, _unreachable)
