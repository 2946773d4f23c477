"""y = residual + activation(x @ w + bias) in two steps of XLA's own: the weight is dequantized, then multiplied.

    w'[n, k] = round_to_x_dtype((code - zero_point) * scale)        one fusion: words in, dense rows out
    y[m, n]  = sum_k x[m, k] * w'[n, k]                             the library's product, float32 sums

For many rows of x, where the product outweighs writing and reading the dense weight, and for every format, group, block
and zero point there is. `transposed` contracts over n instead: `x[M, N] @ w'[N, K]`.

Numerics: the weight is rounded to x's dtype (float32 stays), the products are exact, sums float32, the result rounded
once. A bfloat16 result has about sqrt(2) times the error of rounding alone: that of w' and its own.

Scratch: the dense weight, at most `SCRATCH` bytes of it: a larger one is made and used a range of rows at a time. A
stack of weights, batched by vmap, takes the scratch of each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.finish import finish
from pallas_kernels.xla import unpack

SCRATCH = 512 * 2**20
_ROWS = 128  # a range of rows is a multiple of this


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_dtype: str, x_format: str | None, features: frozenset[str], **_: Any
) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if x_format is not None:
        return f"it takes x as it is, not in {x_format}"
    if x_dtype not in ("float32", "bfloat16", "float16"):
        return f"it takes x in float32, bfloat16 or float16, not in {x_dtype}"
    if "offset" in features:
        return "it has no offset to add to the scaled codes"
    return None


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """No configurations: XLA tunes the product, and the rest has no choice."""
    return []


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


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    bits: int,
    group: int,
    block_n: int = 1,
    transposed: bool = False,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    codebook: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: `[M, K]`, `[M, N]` if transposed; float32, bfloat16 or float16.
      (others: as `unpack.dequantize` and `finish`)

    Returns:
      `[M, N]`, or, transposed, `[M, K]` with K as stored, padding included; in `out_dtype`, default x's.
    """
    n = packed.shape[0]
    k = packed.shape[1] * (unpack.BLOCK if bits < 8 else 1) if transposed else x.shape[1]
    at_once = _rows_at_once(n, k, x.dtype.itemsize, block_n)
    per_row = transposed and global_scale is not None and global_scale.ndim == 1

    def dense(first: Any, rows: int) -> jax.Array:
        """Rows of the weight, in x's dtype, in memory."""

        def cut(a: jax.Array, block: int) -> jax.Array:
            if a.shape[0] == 1 or rows == n:
                return a
            return jax.lax.dynamic_slice_in_dim(a, first // block, -(-rows // block))

        w = unpack.dequantize(
            cut(packed, 1), cut(scale, block_n), weight=weight, bits=bits, group=group, block_n=block_n, k=k,
            zero_point=None if zero_point is None else cut(zero_point, block_n), codebook=codebook,
        )  # fmt: skip
        if per_row:
            assert global_scale is not None
            w = w * cut(global_scale[:, None], 1)
        # The barrier keeps the codes out of the product, which would decode them once a tile of it.
        return jax.lax.optimization_barrier(w.astype(x.dtype))

    def part(first: Any, rows: int) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(x, first, rows, axis=1) if transposed and rows < n else x
        return _product(columns, dense(first, rows), transposed)

    whole, rest = divmod(n, at_once)
    if whole == 1 and not rest:
        y = part(0, n)
    elif transposed:
        zero = jnp.zeros((x.shape[0], k), jnp.float32)
        y = jax.lax.fori_loop(0, whole, lambda i, total: total + part(i * at_once, at_once), zero)
        y = y + part(whole * at_once, rest) if rest else y
    else:
        parts = jax.lax.map(lambda i: part(i * at_once, at_once), jnp.arange(whole))
        y = parts.swapaxes(0, 1).reshape(x.shape[0], whole * at_once)
        y = jnp.concatenate([y, part(whole * at_once, rest)], axis=1) if rest else y
    return finish(
        y, jnp.dtype(out_dtype or x.dtype), global_scale=None if per_row else global_scale, bias=bias,
        activation=activation, residual=residual,
    )  # fmt: skip
