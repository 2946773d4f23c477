"""y = residual + activation(x @ w + bias) in two steps: one kernel writes the dense weight, the library multiplies.

    w'[n, k] = round_to_x_dtype(scale[n, k // g] * value(code[n, k]))       words in, dense rows out: this kernel
    y[m, n]  = sum_k x[m, k] * w'[n, k]                                     the library's product, float32 sums

Operands as `matmul_tall`; x is `[M, N]` where the product is transposed, `x @ w'`.

Work: a program dequantizes 32 rows by 256 columns, once: `weight_tile`, then through shared memory into the order in
which a warp writes whole lines, 16 bytes a thread. XLA's own fusion (`xla.dequantize_dot`) has a thread for each 4
values, whose words, scale and shifts it loads and whose indices it computes: 15 instructions a value where this has 3.6
(int4, groups of 128, sm_90a), and a thread waits for memory once for 4 values where here it does for 64.

Numerics: `weight_tile`'s roundings of the weight, float32 sums, one rounding of the result: about sqrt(3) times the
error of rounding the exact result for integers with float16 scales.

Scratch: the dense weight, at most 512 MiB of it: a larger one is made and used a range of rows at a time. A stack of
weights, batched by vmap, takes the scratch of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dense_dot import cut_rows, dense_dot
from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.result import result
from pallas_kernels.triton import weight_tile
from pallas_kernels.triton.operand import BLOCK
from pallas_kernels.triton.weight_tile import Weight

_ROWS, _BLOCKS, _WARPS = 32, 2, 4  # of a program: 64 values a thread, 40 registers (int4), 12 programs a multiprocessor


def unsupported(m: int, k: int, n: int, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    return why_not(k, n, **facts)


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """No configurations: the library tunes its product, and writing the weight is bound by its bytes."""
    return []


def _kernel(weight: Weight, blocks: int, *refs: Any) -> None:
    """One program: a tile of the weight."""
    column, row, out_ref = pl.program_id(0), pl.program_id(1), refs[-1]
    values = weight_tile.values(weight, weight.refs(refs), row, column, (_ROWS, blocks), out_ref.dtype.name)
    shape = (_ROWS, blocks * BLOCK)
    first, first_k = row * _ROWS, column * shape[1]
    live = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < out_ref.shape[0]
    if out_ref.shape[1] % shape[1]:
        live &= first_k + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < out_ref.shape[1]
    plgpu.store(out_ref.at[pl.ds(first, shape[0]), pl.ds(first_k, shape[1])], values, mask=live)


def dequantize(
    packed: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    *,
    weight: str,
    group: int,
    k: int,
    dtype: Any,
    interpret: bool = False,
) -> jax.Array:
    """The first `k` columns of a weight, `[N, k]` in bfloat16 or float16; a scale for all of it is left out.

    Args:
      packed: uint32 `[N, B, 4 * bits]`; scale, zero_point: of `matmul_tall`.
      weight: "int2" .. "int6", "e2m1", "nf4" or "fp4".
      group: elements of K that share a scale.
    """
    of = weight_tile.describe(packed, scale, zero_point, weight, group, interpret)
    # a program's blocks are in one group, or groups in its blocks
    blocks = 1 if of.blocks % _BLOCKS or (of.group > BLOCK and of.group % (_BLOCKS * BLOCK)) else _BLOCKS
    return pl.pallas_call(
        functools.partial(_kernel, of, blocks),
        grid=(-(-k // (blocks * BLOCK)), -(-of.n // _ROWS)),
        out_shape=result((of.n, k), dtype, packed, scale),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=f"qjax_{weight}_dequantize",
    )(*weight_tile.operands(of, packed, scale, zero_point))


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    group: int,
    transposed: bool = False,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: `[M, K]`, `[M, N]` if transposed.
      interpret: run in plain JAX on any machine.
      (others: of `dequantize`, and as `finish`)

    Returns:
      `[M, N]`, or, transposed, `[M, K]` with K as stored, padding included; in `out_dtype`, default x's.
    """
    n, k = packed.shape[0], packed.shape[1] * BLOCK if transposed else x.shape[1]
    if transposed and global_scale is not None and global_scale.ndim == 1:  # of rows, over which the sum runs
        scale, global_scale = scale.astype(jnp.float32) * global_scale[:, None], None
    if scale.size == 1:
        one = scale.reshape(()).astype(jnp.float32)
        global_scale = one if global_scale is None else one * global_scale

    def dense(first: Any, rows: int) -> jax.Array:
        cut = functools.partial(cut_rows, n=n, first=first, rows=rows)
        zero = None if zero_point is None else cut(zero_point)
        return dequantize(
            cut(packed), cut(scale), zero, weight=weight, group=group, k=k, dtype=x.dtype, interpret=interpret
        )

    y = dense_dot(x, dense, n, k, transposed=transposed)
    return finish(
        y, jnp.dtype(out_dtype or x.dtype), global_scale=global_scale, bias=bias, activation=activation,
        residual=residual,
    )  # fmt: skip
