"""y = residual + activation(x @ w + bias) in bfloat16 or float16, with cuBLASLt's epilogue where it has one.

`dense` multiplies a weight of x's dtype. `matmul` does so with 8-bit codes of one scale a row, or in all:

    y[m, n] = s[n] * sum_k x[m, k] * code[n, k]

The codes become x's dtype in one pass over the weight, which is exact, so that this pays where there are many rows of
x; the scale multiplies the float32 sum. The product by the transpose, a gradient's, contracts over the rows that have
the scales, of blocks too: there that pass makes values, and turns them.

    y[m, k] = sum_n x[m, n] * round_to_x_dtype(code[n, k] * scale[n, k])

Numerics: exact products, float32 sums, one rounding; by the transpose values are rounded, too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cublaslt import library
from xla_ffi.cublaslt.call import CANDIDATES, DEFAULT, Call, Operands, multiply
from xla_ffi.cublaslt.call import variant as variant
from xla_ffi.cublaslt.epilogue import Epilogue
from xla_ffi.cublaslt.library import missing as missing

_ALIGNED = 8  # elements of 16 bits: rows start at multiples of 16 bytes


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, x_dtype: str, group: int, block_n: int,
    transposed: bool, features: frozenset[str] = frozenset(), cc: int, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if weight not in ("int8", "e4m3", "e5m2"):
        return f"it reads codes of 8 bits, the weight is {weight}"
    if x_format is not None or x_dtype not in ("bfloat16", "float16"):
        return f"it takes x in bfloat16 or float16, not in {x_format or x_dtype}"
    if not transposed and (group < k or 1 < block_n < n):
        return f"scales of {block_n} x {group}: it knows one a row, or one in all"
    if features & {"zero_point", "zero_point_real"}:
        return "it has no zero points"
    if k % _ALIGNED or n % _ALIGNED:
        return f"K={k} and N={n}: cuBLASLt wants multiples of {_ALIGNED}, rows of 16 bytes"
    if cc < 80:
        return "tensor cores multiply bfloat16 from compute capability 8.0 on"
    return library.missing()


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """The first of the heuristic's results, by rank."""
    return [{"candidate": i} for i in range(CANDIDATES)]


def dense(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
) -> jax.Array:
    """`residual + activation(x @ w.T + bias)`.

    Args:
      x: bfloat16 or float16 `[M, K]`; w: the same `[N, K]`; K and N multiples of 8.
      bias: `[N]`; residual: `[M, N]`; inside the library where both have `out_dtype`.
      activation: elementwise, in float32; relu and the tanh form of gelu run inside the library.
      out_dtype: x's by default, or float32.
      config: `candidate`, which of the heuristic's results runs.

    Returns:
      `[M, N]` in `out_dtype`.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    candidate = (config or {}).get("candidate", 0)
    after = Epilogue(bias, activation, residual)
    epilogue = after.code(out_dtype)
    if epilogue is not None:
        call = Call(out_dtype, epilogue=epilogue, candidate=candidate)
        return multiply(call, Operands(x, w, bias=bias, residual=residual))[0]
    call = Call(jnp.dtype("float32"), epilogue=DEFAULT, candidate=candidate)
    return after.finish(multiply(call, Operands(x, w))[0], out_dtype)


def _expanded(scale: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """Scales of blocks for each element, or as they are along an axis where all have the same."""
    for axis, (size, of_block) in enumerate(zip(shape, block, strict=True)):
        if 1 < scale.shape[axis] < size:
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, of_block, axis=axis), 0, size, axis=axis)
    return scale


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    transposed: bool = False,
    group: int = 0,
    block_n: int = 1,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: bfloat16 or float16 `[M, K]`, `[M, N]` if transposed.
      packed: int8, float8_e4m3fn or float8_e5m2 `[N, K]`.
      scale: `[N, 1]` or `[1, 1]`, or `[ceil(N / block_n), ceil(K / group)]` if transposed; global_scale: `[]` or `[N]`,
        another factor.
      (others: as `dense`)

    Returns:
      `[M, N]`, or, transposed, `[M, K]`, in `out_dtype`, default x's.
    """
    if transposed:
        w = packed.astype(jnp.float32) * _expanded(scale.astype(jnp.float32), packed.shape, (block_n, group))
        if global_scale is not None:
            w = w * (global_scale[:, None] if global_scale.ndim else global_scale).astype(jnp.float32)
        w = jax.lax.optimization_barrier(w.astype(x.dtype).T)
        return dense(x, w, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype, config=config)
    y = dense(x, jax.lax.optimization_barrier(packed.astype(x.dtype)), out_dtype=jnp.float32, config=config)
    y = y * scale[:, 0].astype(jnp.float32)
    if global_scale is not None:
        y = y * global_scale.astype(jnp.float32)
    return Epilogue(bias, activation, residual).finish(y, jnp.dtype(out_dtype or x.dtype))
