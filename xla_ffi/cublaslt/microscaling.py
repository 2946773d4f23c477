"""y = residual + activation(x @ w + bias) with a scale for each 32 or 16 codes on both sides: Blackwell's formats.

    MXFP8   x, w e4m3 or e5m2;  scales e8m0, one for each 32 of K
    MXFP4   w e2m1 with scales e8m0 of 32: its codes become e4m3, exactly, and the product is MXFP8's
    NVFP4   x, w e2m1;          scales e4m3, one for each 16 of K; a float32 factor in all

Operands
    x      float8 [M, K], or uint8 [M, K/2] of e2m1 pairs, the first code low; x_scale [M, K/group]
    packed float8 [N, K], or uint32 [N, ceil(K/128), 16] of e2m1, in the packed order of words (see `_pairs`)
    scale  [N, K/group]; global_scale [] or [N]; bias [N]; residual [M, N]

Written to cuBLASLt's documented modes VEC32_UE8M0 and VEC16_UE4M3 and compiled for a B200; not yet run on one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cublaslt import library
from xla_ffi.cublaslt.call import CANDIDATES, VEC16_E4M3, VEC32_E8M0, Call, Operands, multiply
from xla_ffi.cublaslt.call import variant as variant
from xla_ffi.cublaslt.epilogue import Epilogue
from xla_ffi.cublaslt.library import missing as missing

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FIRST_VERSION = 120800
_SAFE_VERSION = 130200  # before it, cuBLASLt corrupts results beside concurrent kernels on 10.x and 11.0


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, group: int, scale_dtype: str, transposed: bool,
    cc: int, x_group: int | None = None, **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None. `x_group`: elements of a row of x that share a scale."""
    if cc < 100:
        return "tensor cores take a scale for each 32 or 16 codes from compute capability 10.0 on"
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    mx = scale_dtype == "float8_e8m0fnu" and group == 32 and weight in ("e4m3", "e5m2", "e2m1")
    nv = scale_dtype == "float8_e4m3fn" and group == 16 and weight == "e2m1"
    if not (mx or nv):
        return f"{weight} with {scale_dtype} scales of {group}: it knows MXFP8, MXFP4 and NVFP4"
    if x_group != group or x_format != ("e2m1" if nv else "e4m3"):
        return f"it takes x in {'e2m1' if nv else 'e4m3'} with a scale for each {group}, not {x_format or 'as it is'}"
    if k % 32 or n % 8:
        return f"K={k} and N={n}: cuBLASLt wants whole groups and rows of 16 bytes, multiples of 32 and 8"
    version = library.version()
    if not library.missing() and version < (_SAFE_VERSION if cc < 120 else _FIRST_VERSION):
        return f"cuBLASLt {version} is older than {_SAFE_VERSION if cc < 120 else _FIRST_VERSION}, which this GPU needs"
    return library.missing()


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """The first of the heuristic's results, by rank."""
    return [{"candidate": i} for i in range(CANDIDATES)]


def swizzle(scale: jax.Array) -> jax.Array:
    """Scales in the order in which Blackwell's tensor cores read them.

    Args:
      scale: 8-bit `[R, C]`, of rows and of groups along K.

    Returns:
      uint8 `[ceil(R/128) * ceil(C/4) * 512]`: tiles of 128 x 4, row by row; in a tile (r, c) lies at
      `(r % 32) * 16 + (r // 32) * 4 + c`. What pads a tile is zero.
    """
    codes = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    codes = jnp.pad(codes, ((0, -scale.shape[0] % 128), (0, -scale.shape[1] % 4)))
    tiles = codes.reshape(codes.shape[0] // 128, 4, 32, codes.shape[1] // 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(-1)


def _pairs(packed: jax.Array, k: int) -> jax.Array:
    """Packed words -> uint8 `[N, K/2]`, codes 2i (low) and 2i + 1 in byte i.

    Word `4c + j` of a block of 128 holds at bit `4 * (2s + h)` of its lower half the code of k = 32j + 16s + 8h + 2c,
    and in its upper half that of k + 1: with the half word next to it shifted down by 12, a byte.
    """
    words = packed.reshape(*packed.shape[:2], 4, 4, 1)  # c, j
    shifted = words >> (4 * jnp.arange(4, dtype=jnp.uint32))  # c, j, 2s + h
    pairs = ((shifted & 0xF) | ((shifted >> 12) & 0xF0)).astype(jnp.uint8)
    return pairs.transpose(0, 1, 3, 4, 2).reshape(packed.shape[0], -1)[:, : k // 2]


def _as_e4m3(pairs: jax.Array) -> jax.Array:
    """uint8 `[N, K/2]` of e2m1 pairs -> the same values in e4m3, `[N, K]`."""
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(pairs.shape[0], -1)
    values = jnp.array(_E2M1 + tuple(-v for v in _E2M1), jnp.float8_e4m3fn)
    return values[codes]


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: dict[str, int] | None = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring: `[M, N]` in `out_dtype`, sums in float32, rounded once."""
    fp4 = x.dtype == jnp.uint8
    k = x.shape[1] * (2 if fp4 else 1)
    w = packed
    if packed.dtype == jnp.uint32:
        w = _pairs(packed, k) if fp4 else _as_e4m3(_pairs(packed, k))
    mode = VEC16_E4M3 if fp4 else VEC32_E8M0
    call = Call(jnp.dtype("float32"), mode, mode, candidate=(config or {}).get("candidate", 0))
    y, _amax = multiply(call, Operands(x, w, swizzle(x_scale), swizzle(scale)))
    if global_scale is not None:
        y = y * global_scale
    return Epilogue(bias, activation, residual).finish(y, jnp.dtype(out_dtype))
