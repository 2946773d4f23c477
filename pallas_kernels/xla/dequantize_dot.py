"""y = residual + activation(x @ w + bias) in two steps of XLA's own: the weight is dequantized, then multiplied.

    w'[n, k] = round_to_x_dtype((code - zero_point) * scale)        one fusion: words in, dense rows out
    y[m, n]  = sum_k x[m, k] * w'[n, k]                             the library's product, float32 sums

For many rows of x, where the product outweighs writing and reading the dense weight, and for every format, group, block
and zero point there is. `transposed` contracts over n instead: `x[M, N] @ w'[N, K]`.

Numerics: the weight is rounded to x's dtype (float32 stays), the products are exact, sums float32, the result rounded
once. A bfloat16 result has about sqrt(2) times the error of rounding alone: that of w' and its own.

Scratch: the dense weight, at most 512 MiB of it: a larger one is made and used a range of rows at a time. A
stack of weights, batched by vmap, takes the scratch of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dense_dot import cut_rows, dense_dot
from pallas_kernels.finish import finish
from pallas_kernels.xla import unpack


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
    per_row = transposed and global_scale is not None and global_scale.ndim == 1

    def dense(first: Any, rows: int) -> jax.Array:
        """Rows of the weight, in x's dtype."""
        cut = functools.partial(cut_rows, n=n, first=first, rows=rows)
        w = unpack.dequantize(
            cut(packed), cut(scale, block=block_n), weight=weight, bits=bits, group=group, block_n=block_n, k=k,
            zero_point=None if zero_point is None else cut(zero_point, block=block_n), codebook=codebook,
        )  # fmt: skip
        if per_row:
            assert global_scale is not None
            w = w * cut(global_scale[:, None])
        return w.astype(x.dtype)

    y = dense_dot(x, dense, n, k, block_n=block_n, transposed=transposed)
    return finish(
        y, jnp.dtype(out_dtype or x.dtype), global_scale=None if per_row else global_scale, bias=bias,
        activation=activation, residual=residual,
    )  # fmt: skip
