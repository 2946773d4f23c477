"""x -> codes of eight bits and their scales, in one kernel that reads x once.

    scale[m, c] = amax(|x[m, unit c]|) / top, 1 where that is 0;  codes[m, k] = round(x[m, k] / scale[m, c])

A unit is a row of x or 128 elements of it; top is 127 (int8) or 448 (e4m3); integers round half to even. XLA makes
three kernels of the formula and reads x twice: on an H200 1.5 us more at 16 rows of 4096, 16 us at 2048 of 8192.

Work: a program holds some units of one row in registers, `[units, width]`, finds each one's largest magnitude, divides.

Numerics: quotients, not products with reciprocals, which is what XLA makes of a divisor that it sees to be constant or
the same for many: `+ 0 * x` hides that. On a GPU they are PTX's `div.full.f32`, off by 2 ulp at most.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.result import result

WIDEST = 32768  # elements that a program holds in registers
_TOP = {"int8": 127.0, "float8_e4m3fn": 448.0}
_ROUNDER = 1.5 * 2**23  # v + this has v, rounded half to even, in its low bits while |v| < 2^22


def unsupported(k: int, dtype: Any, unit: int, cc: int) -> str | None:
    """Why rows of k elements cannot be quantized so by compute capability `cc / 10`, or None."""
    if jnp.dtype(dtype).name not in _TOP:
        return f"it makes codes in {', '.join(_TOP)}, not {jnp.dtype(dtype).name}"
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and cc < 89:
        return f"Triton converts to FP8 from compute capability 8.9 on, this is {cc / 10:.1f}"
    if min(unit, k) > WIDEST:
        return f"it holds {WIDEST} elements at once, a scale is for {min(unit, k)}"
    return None


def _kernel(k: int, unit: int, units: int, width: int, x_ref: Any, codes_ref: Any, scale_ref: Any) -> None:
    """One program: `units` units of a row, padded to `width` elements."""
    row, first = pl.program_id(0), pl.program_id(1) * units
    shape = (units, width)
    inside = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    at = (first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)) * unit + inside
    mask = (at < k) & (inside < unit)
    x = plgpu.load(x_ref.at[row, at], mask=mask, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)
    top = _TOP[codes_ref.dtype.name]
    largest = jnp.max(jnp.abs(x), axis=1)
    scale = largest / (np.float32(top) + 0 * largest)
    scale = jnp.where(scale == 0, np.float32(1), scale)
    ratio = x / (scale[:, None] + 0 * x)
    if codes_ref.dtype == jnp.int8:
        sum_ = jax.lax.bitcast_convert_type(jnp.clip(ratio, -128, 127) + np.float32(_ROUNDER), jnp.int32)
        codes = (sum_ - np.float32(_ROUNDER).view(np.int32)).astype(jnp.int8)
    else:
        codes = jnp.clip(ratio, -top, top).astype(codes_ref.dtype)
    plgpu.store(codes_ref.at[row, at], codes, mask=mask)
    columns = first + jnp.arange(units)
    plgpu.store(scale_ref.at[row, columns], scale, mask=columns < scale_ref.shape[1])


def quantize_rows(x: jax.Array, dtype: Any, unit: int, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of x.

    Args:
      x: bfloat16, float16 or float32 `[M, K]`.
      dtype: int8 or float8_e4m3fn.
      unit: elements of K that share a scale; K or more for one scale a row.
      interpret: run in plain JAX on any machine.

    Returns:
      `(codes [M, K] of dtype, scale float32 [M, ceil(K / unit)])`.
    """
    (m, k), unit = x.shape, min(unit, x.shape[1])
    columns = -(-k // unit)
    width = pl.next_power_of_2(unit)
    units = min(pl.next_power_of_2(columns), max(1, 4096 // width))
    return pl.pallas_call(
        functools.partial(_kernel, k, unit, units, width),
        grid=(m, -(-columns // units)),
        out_shape=(result((m, k), dtype, x), result((m, columns), jnp.float32, x)),
        compiler_params=plgpu.CompilerParams(num_warps=min(32, max(4, units * width // 1024))),
        interpret=interpret,
        name="qjax_quantize_rows",
    )(x)
