"""y = residual + activation(global_scale * sx * (xq @ w) + bias) on a CPU, int8 codes of x by codes of w in int32.

    y[m, n] = sx[m] * sum over groups of scale[n', k'] * sum_k xq[m, k] * (code[n, k] - zero_point[n', k'])

Numerics: the sum over a group is an exact int32; with one scale a row of w that is the whole sum, rounded once. Groups
and real zero points are summed in float32. `kernels_int8.h` has the algorithm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cpu import library
from xla_ffi.cpu.call import multiply
from xla_ffi.cpu.matmul import configs as configs
from xla_ffi.cpu.matmul import missing as missing
from xla_ffi.finish import finish

_UNIT = {"int4": 32, "int8": 128}  # codes along k that must share a scale
_K_MAX = 2**31 // 2**15  # |xq * code| is at most 2^14, and with an offset half as much again


def unsupported(
    m: int, k: int, n: int, *, weight: str, group: int, x_format: str | None, x_granularity: str | None,
    transposed: bool, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if x_format != "int8" or x_granularity == "block" or weight not in _UNIT:
        return f"it multiplies int8, with a scale a row, by int4 and int8, not {x_format or 'x as it is'} by {weight}"
    if group < k and group % _UNIT[weight]:
        return f"groups of {group}: with {weight} it knows multiples of {_UNIT[weight]}, or one in all of K"
    if k > _K_MAX:
        return f"K={k}: sums of more than {_K_MAX} products may not fit an int32"
    return library.missing()


def variant() -> str | None:
    """The instructions that the kernel uses on this machine; None where the library is not there."""
    return next(iter(library.int8_instructions()), None)


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    group: int,
    block_n: int = 1,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.float32,
    config: dict[str, str] | None = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: int8 `[M, K]`; x_scale: float32 `[M, 1]`.
      packed: int4 in the packed order, uint32 `[N, ceil(K/128), 16]`, or int8 `[N, K]`.
      config: `instructions`, one of `library.int8_instructions()`; empty takes the first.
      (others: as `xla_ffi.cpu.matmul.matmul`)

    Returns:
      `[M, N]` in `out_dtype`.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    instructions = (config or {}).get("instructions", "")
    y = multiply(
        x, packed, scale, group=group, block_n=block_n, zero_point=zero_point, instructions=instructions
    )  # fmt: skip
    y = y * x_scale
    return finish(
        y, jnp.dtype(out_dtype), global_scale=global_scale, bias=bias, activation=activation, residual=residual
    )
