"""y = residual + activation(global_scale * (x @ w) + bias) on a CPU, the codes decoded in registers.

    w[k, n] = (code[n, k] - zero_point[n', k']) * scale[n', k']        n' = n // block_n, k' = k // group
    w[k, n] = table[code[n, k]] * scale[n', k']

Transposed it is x @ w.T, as gradients with respect to x are, read from the same codes.

One custom call reads the packed codes as they are stored and writes float32; what follows the product is plain JAX.
`kernels.h` has the algorithm. Work is split over columns of y on XLA's own threads, and each element of y is summed in
one order: the result does not depend on how many threads there are.

Numerics: x and decoded codes in float32, sums in float32, one rounding. Codes of e4m3's NaN are read as 480.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cpu import library
from xla_ffi.cpu.call import multiply
from xla_ffi.finish import finish

_UNIT = 16  # codes along k that must share a scale
_X = ("float32", "bfloat16", "float16")
_SCALES = (*_X, "float8_e8m0fnu", "float8_e4m3fn")


def unsupported(
    m: int, k: int, n: int, *, group: int, x_format: str | None, x_dtype: str, scale_dtype: str,
    features: frozenset[str] = frozenset(), **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if x_format is not None or x_dtype not in _X:
        return f"it takes x in {', '.join(_X)}, not in {x_format or x_dtype}"
    if scale_dtype not in _SCALES and "nested_scale" not in features:
        return f"it reads scales in {', '.join(_SCALES)}, not in {scale_dtype}"
    if group < k and group % _UNIT:
        return f"groups of {group}: it knows multiples of {_UNIT}, or one in all of K"
    return library.missing()


def missing() -> str | None:
    """Why no product can run on this machine, or None."""
    return library.missing()


def variant() -> str | None:
    """The instructions that the kernel uses on this machine; None where the library is not there."""
    return next(iter(library.instructions()), None)


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, str]]:
    """Nothing to choose: the newest instructions of the machine are the fastest."""
    return []


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    block_n: int = 1,
    table: tuple[float, ...] = (),
    transposed: bool = False,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    codebook: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, str] | None = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: `[M, K]`, transposed `[M, N]`, float32, bfloat16 or float16.
      packed: uint32 `[N, ceil(K/128), 4*bits]` in the packed order, or codes of 8 bits `[N, K]`.
      scale: `[ceil(N/block_n), ceil(K/group)]`, float32, bfloat16, float16, e8m0 or e4m3.
      group, block_n: columns and rows of the weight that share a scale.
      table: values of the format's codes; empty for integers and FP8.
      zero_point: like scale, int8 or float; codebook: float32 `[2**bits]` in place of the table.
      global_scale: `[]` or `[N]`; bias: `[N]`, transposed `[K]`; residual: as the result.
      activation: elementwise, in float32.
      out_dtype: x's by default.
      config: `instructions`, one of `library.instructions()`, for tests and comparisons; empty takes the first.

    Returns:
      `[M, N]` in `out_dtype`; transposed `[M, K]`, K as stored, padding included.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if transposed and global_scale is not None and global_scale.ndim == 1:  # of rows of w, over which the sum runs
        x, global_scale = x.astype(jnp.float32) * global_scale, None
    y = multiply(
        x, packed, scale, group=group, block_n=block_n, zero_point=zero_point, codebook=codebook,
        table=table, transposed=transposed, instructions=(config or {}).get("instructions", ""),
    )  # fmt: skip
    return finish(
        y, out_dtype, global_scale=global_scale, bias=bias, activation=activation,
        residual=residual,
    )  # fmt: skip
