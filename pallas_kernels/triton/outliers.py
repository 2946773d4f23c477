"""The columns of x that eight bits serve badly, taken out of it and multiplied in 16 bits: LLM.int8's decomposition.

    x @ w = rest @ w + outlier_x @ outlier_w.T,  outlier_x[m, c] = x[m, columns[c]],  outlier_w[n, c] = w[columns[c], n]

A column is one where some row's magnitude reaches the threshold. Shapes are static: there is room for `capacity`
columns, the largest go first, those that find no room stay in `rest` (less exact, never wrong), and unused room is
zeros at `columns = K`. Which columns go depends on all rows that are multiplied together.
Source: Dettmers et al., LLM.int8 (2022), section 3.2; the threshold there is 6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Split(NamedTuple):
    """x in two parts.

    Attributes:
      rest: `[M, K]`, zero in the columns that left.
      outlier_x: `[M, capacity]`, of x's dtype.
      columns: int32 `[capacity]`; K where there is none.
    """

    rest: jax.Array
    outlier_x: jax.Array
    columns: jax.Array


def split_outliers(x: jax.Array, threshold: float, capacity: int) -> Split:
    """Takes up to `capacity` columns that reach `threshold` out of x `[M, K]`."""
    largest, columns = jax.lax.top_k(jnp.max(jnp.abs(x), axis=0), min(capacity, x.shape[1]))
    columns = jnp.where(largest >= threshold, columns, x.shape[1])
    columns = jnp.pad(columns, (0, capacity - columns.shape[0]), constant_values=x.shape[1])
    outlier_x = jnp.take(x, columns, axis=1, mode="fill", fill_value=0)
    return Split(x.at[:, columns].set(0, mode="drop"), outlier_x, columns)


def outlier_rows(
    codes: jax.Array, scale: jax.Array, columns: jax.Array, *, group: int, block_n: int, dtype: jnp.dtype
) -> jax.Array:
    """`outlier_w [N, capacity]` in `dtype`: columns of a weight of codes `[N, K]`, times their scales, zero past K.

    Args:
      scale: `[ceil(N / block_n), ceil(K / group)]`.
      columns: of `split_outliers`.
    """
    values = jnp.take(codes, columns, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    scales = jnp.take(scale, columns // group, axis=1, mode="clip").astype(jnp.float32)
    return (values * jnp.repeat(scales, block_n, axis=0)[: codes.shape[0]]).astype(dtype)
