"""x in float16: each row times the power of two that brings its largest number to `[2^14, 2^15)`.

float16 has three bits more than bfloat16 and a shorter range: 2^29 below the largest numbers keep all their bits. A
program is one row, read once; reduction and product in one launch, of which XLA makes three.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref

AT = 14  # exponent of a row's largest number
_LANES = 128
_MOST = 8 * _LANES  # numbers that a warpgroup loads at once, 16 bytes a lane


def power(largest: jax.Array, at: int) -> tuple[jax.Array, jax.Array]:
    """A power of two that brings a positive float32 to `[2^at, 2^(at + 1))`, and its inverse; both normal numbers."""
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - at
    exponent = jnp.minimum(jnp.maximum(exponent, 1), 253)
    to, back = ((254 - exponent) << 23, exponent << 23)
    return jax.lax.bitcast_convert_type(to, jnp.float32), jax.lax.bitcast_convert_type(back, jnp.float32)


def fit_plainly(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`fit_rows` by its formula."""
    wide = x.astype(jnp.float32)
    to, back = power(jnp.max(jnp.abs(wide), axis=1, keepdims=True), AT)
    return (wide * to).astype(jnp.float16), back


def _keep(ref: Any, row: Any, value: Any) -> None:
    """`ref[row] = value`, by every lane."""
    memref.store(value.registers.item(), ref, [arith.index_cast(ir.IndexType.get(), row.registers.item())])


def _kernel(chunk: int, x_ref: Any, out_ref: Any, scale_ref: Any) -> None:
    row, k = jax.lax.axis_index("row"), x_ref.shape[1]
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // _LANES)
    places = [(row, pl.ds(min(first, k - chunk), chunk)) for first in range(0, k, chunk)]  # the last may overlap
    parts = [plgpu.load(x_ref.at[place], layout=layout, optimized=False).astype(jnp.float32) for place in places]
    to, back = power(jnp.max(functools.reduce(jnp.maximum, [jnp.abs(part) for part in parts])), AT)
    for place, part in zip(places, parts, strict=True):
        out_ref[place] = (part * to).astype(jnp.float16)
    splat = plgpu.Layout.WG_SPLAT(())
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat))(lambda _, *given: _keep(*given))(scale_ref, row, back)


def fit_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as above, and what undoes it.

    Args:
      x: `[M, K]`, K a multiple of 8.

    Returns:
      float16 `[M, K]` and float32 `[M, 1]`, by which its rows are multiplied to be x's.
    """
    m, k = x.shape
    if k < _LANES:
        return fit_plainly(x)
    chunk = min(_MOST, 1 << (k.bit_length() - 1))
    fitted, scale = plgpu.kernel(
        functools.partial(_kernel, chunk),
        out_type=(jax.ShapeDtypeStruct((m, k), jnp.float16), jax.ShapeDtypeStruct((m,), jnp.float32)),
        grid=(m,),
        grid_names=("row",),
        kernel_name="qjax_fit_rows_hopper",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)
    return fitted, scale[:, None]
