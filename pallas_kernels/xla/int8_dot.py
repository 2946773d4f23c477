"""y = residual + activation(x @ w + bias) with int8 codes on both sides: XLA's own integer product.

    y[m, n] = sx[m] * sw[n] * (sum_k xq[m, k] * wq[n, k] - zp[n] * sum_k xq[m, k])      sums are exact int32

Operands
    xq int8 [M, K]; sx float32 [M, 1] or [1, 1]
    wq int8 [N, K]; sw [ceil(N / block_n), 1]; zp like sw: int8, or a float
    bias [N], residual [M, N]

XLA gives this product to cuBLASLt or to Triton, whichever it times faster, on every GPU with int8 tensor cores, as long
as the weight is `[N, K]`: of `[K, N]` it would write the transpose at each call. What follows the sum is one fusion, in
Triton's case the product's own.

Numerics: the sum is exact, the rest float32, rounded once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.finish import finish


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, group: int, transposed: bool,
    x_granularity: str = "token", **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None. `x_granularity`: `block` where x has a scale for each 128 of K."""
    if weight != "int8" or x_format != "int8":
        return f"it multiplies int8 by int8, not {x_format or 'x as it is'} by {weight}"
    if transposed:
        return "scales of rows vary along the transposed product's sum, which is of integers"
    if group < k or x_granularity == "block":
        return f"groups of {min(group, 128)}: the int32 sum runs over all of K={k} before any scale"
    return None


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """No configurations: XLA tunes the product."""
    return []


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    block_n: int = 1,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      block_n: rows of the weight that share a scale; N or more for all.
      global_scale: `[]` or `[N]`, a factor of the weight.
      activation: elementwise, in float32.
      (others: the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`.
    """
    n = packed.shape[0]

    def of_rows(a: jax.Array) -> jax.Array:
        """One value a row, or one in all: `[N or 1]`."""
        return a[:, 0] if a.shape[0] in (1, n) else jnp.repeat(a[:, 0], block_n)[:n]

    total = jax.lax.dot_general(x, packed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    if zero_point is not None:
        exact = jnp.int32 if zero_point.dtype == jnp.int8 else jnp.float32
        sums = x.sum(axis=1, keepdims=True, dtype=jnp.int32).astype(exact)
        total = total.astype(exact) - sums * of_rows(zero_point).astype(exact)
    y = total.astype(jnp.float32) * (x_scale * of_rows(scale).astype(jnp.float32))
    return finish(
        y, jnp.dtype(out_dtype), global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
