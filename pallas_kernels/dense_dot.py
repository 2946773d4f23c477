"""x by a dense weight that something else makes, a range of rows at a time, and the library's product. Plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SCRATCH = 512 * 2**20  # bytes of the dense weight that exist at once
_ROWS = 128  # a range of rows is a multiple of this


def _rows_at_once(n: int, k: int, itemsize: int, block_n: int) -> int:
    """Rows whose dense form fits `SCRATCH`, whole blocks of them; N where all do."""
    if n * k * itemsize <= SCRATCH:
        return n
    unit = _ROWS if block_n in (1, n) else max(block_n, _ROWS // block_n * block_n)
    return min(n, max(unit, SCRATCH // (k * itemsize) // unit * unit))


def _product(x: jax.Array, rows: jax.Array, transposed: bool) -> jax.Array:
    """float32 `x @ rows.T`, or `x @ rows`."""
    # Full precision of x's own type: the default takes float32 operands to 19 bits on a GPU.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (0 if transposed else 1,)), ((), ()))
    return jax.lax.dot_general(x, rows, dims, precision=precision, preferred_element_type=jnp.float32)


def cut_rows(a: jax.Array, n: int, first: Any, rows: int, block: int = 1) -> jax.Array:
    """What belongs to `rows` rows of N from `first` on, of an array with a row for each `block` of them, or for all."""
    if a.shape[0] == 1 or rows == n:
        return a
    return jax.lax.dynamic_slice_in_dim(a, first // block, -(-rows // block))


def dense_dot(
    x: jax.Array, dense: Callable[[Any, int], jax.Array], n: int, k: int, *, block_n: int = 1, transposed: bool = False
) -> jax.Array:
    """float32 `x @ w.T`, or `x @ w` if transposed, for w of shape `[N, K]`.

    Args:
      x: `[M, K]`, `[M, N]` if transposed.
      dense: from the first row and their number, which is N or divides by `block_n`, to rows of w in x's dtype.
      block_n: rows that are not to be torn apart.
    """
    at_once = _rows_at_once(n, k, x.dtype.itemsize, block_n)

    def part(first: Any, rows: int) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(x, first, rows, axis=1) if transposed and rows < n else x
        # The barrier keeps what makes the weight out of the product, which would make it once a tile of it.
        return _product(columns, jax.lax.optimization_barrier(dense(first, rows)), transposed)

    whole, rest = divmod(n, at_once)
    if whole == 1 and not rest:
        return part(0, n)
    if transposed:
        zero = jnp.zeros((x.shape[0], k), jnp.float32)
        y = jax.lax.fori_loop(0, whole, lambda i, total: total + part(i * at_once, at_once), zero)
        return y + part(whole * at_once, rest) if rest else y
    parts = jax.lax.map(lambda i: part(i * at_once, at_once), jnp.arange(whole))
    y = parts.swapaxes(0, 1).reshape(x.shape[0], whole * at_once)
    return jnp.concatenate([y, part(whole * at_once, rest)], axis=1) if rest else y
