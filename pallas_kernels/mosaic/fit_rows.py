"""x in float16: each row times the power of two that brings its largest number to `[2^14, 2^15)`.

float16 has three bits more than bfloat16 and a shorter range: 2^29 below the largest numbers keep all their bits. A
program is one row, read once; reduction and product in one launch, of which XLA makes three. Where the weight's bytes
ask for another order of K, pairs are stored in that: XLA takes as long for it as for an eighth of the product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from pallas_kernels.mosaic import byte_operand

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


def _keep_in_order(first: Any, _: Any, ref: Any, row: Any, values: Any) -> None:
    """`ref[row, first:first + len(values)] = byte_operand.in_order(values)`, by pairs."""
    index = ir.IndexType.get()
    row = arith.index_cast(index, row.registers.item())
    for at, found in zip(values.layout.linear_thread_idxs(), values.registers.flat, strict=True):
        for i in range(0, values.layout.vec_size, 2):
            place, column = arith.addi(at, mgpu.c(first + i, index)), mgpu.c(0, index)
            for bits, left in byte_operand.MOVES:
                part = arith.andi(place, mgpu.c(bits, index))
                shift, by = (arith.shli, left) if left >= 0 else (arith.shrui, -left)
                column = arith.ori(column, shift(part, mgpu.c(by, index)))
            pair = vector.extract_strided_slice(ir.VectorType.get((2,), ir.F16Type.get()), found, [i], [2], [1])
            vector.store(pair, ref, [row, column])


def _kernel(chunk: int, bytes_order: bool, x_ref: Any, out_ref: Any, scale_ref: Any) -> None:
    row, k, splat = jax.lax.axis_index("row"), x_ref.shape[1], plgpu.Layout.WG_SPLAT(())
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // _LANES)
    places = [(row, pl.ds(min(first, k - chunk), chunk)) for first in range(0, k, chunk)]  # the last may overlap
    parts = [plgpu.load(x_ref.at[place], layout=layout, optimized=False).astype(jnp.float32) for place in places]
    to, back = power(jnp.max(functools.reduce(jnp.maximum, [jnp.abs(part) for part in parts])), AT)
    for place, part in zip(places, parts, strict=True):
        part = (part * to).astype(jnp.float16)
        if bytes_order:
            keep = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, layout))
            keep(functools.partial(_keep_in_order, place[1].start))(out_ref, row, part)
        else:
            out_ref[place] = part
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat))(lambda _, *given: _keep(*given))(scale_ref, row, back)


def fit_rows(x: jax.Array, *, bytes_order: bool, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """x as above, and what undoes it.

    Args:
      x: `[M, K]`, K a multiple of 8.
      bytes_order: columns as `byte_operand.in_order` has them, K a multiple of 64.
      interpret: by the formula.

    Returns:
      float16 `[M, K]` and float32 `[M, 1]`, by which its rows are multiplied to be x's.
    """
    m, k = x.shape
    if interpret or k < 2 * _LANES:
        fitted, scale = fit_plainly(x)
        return byte_operand.in_order(fitted) if bytes_order else fitted, scale
    chunk = min(_MOST, 1 << (k.bit_length() - 1))
    fitted, scale = plgpu.kernel(
        functools.partial(_kernel, chunk, bytes_order),
        out_type=(jax.ShapeDtypeStruct((m, k), jnp.float16), jax.ShapeDtypeStruct((m,), jnp.float32)),
        grid=(m,),
        grid_names=("row",),
        kernel_name="qjax_fit_rows_hopper",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)
    return fitted, scale[:, None]
