"""y = residual + activation(x @ w + bias) with 8-bit codes on both sides, multiplied as they are by cuBLASLt.

    FP8    y[m, n] = sum_k sx[m, k // 128] * xq[m, k] * sw[n // block_n, k // group] * wq[n, k]
    int8   y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] * wq[n, k]              the sum is an exact int32

Operands
    xq   float8_e4m3fn, float8_e5m2 or int8 [M, K]; sx float32 [M, 1], [1, 1] (one for all rows) or [M, ceil(K/128)]
    wq   the same kinds [N, K], not e5m2 against e5m2; sw [ceil(N / block_n), ceil(K / group)]
    bias [N], residual [M, N]

Scale modes, by what x and w carry (`call` has the layouts):

    x \\ w           one in all        one a row         128 x 128            1 x 128
    [1, 1]          SCALAR, SCALAR    OUTER, OUTER      1X128, BLOCK_128     1X128, 1X128
    [M, 1]          OUTER, OUTER      OUTER, OUTER      1X128, BLOCK_128     1X128, 1X128
    [M, K/128]      1X128, BLOCK_128  1X128, 1X128      1X128, BLOCK_128     1X128, 1X128

Where a side is coarser than its mode, its scales are repeated: cuBLASLt takes no other pairs. OUTER and the modes of
128 exist on compute capability 9.0 only; elsewhere a product with one scale a row or in all leaves them to XLA.

Numerics: float32 sums and one rounding. Without blocks, sums of FP8 that are rounded to bfloat16 are Hopper's fast ones
(`fast_accum`): 2e-3 of relative error against 1.6e-3 of the rounding; the others are within 1.1 of rounding alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cublaslt import library
from xla_ffi.cublaslt.call import BLOCK_1X128, BLOCK_128, CANDIDATES, DEFAULT, OUTER, SCALAR, Call, Operands, multiply
from xla_ffi.cublaslt.call import variant as variant
from xla_ffi.cublaslt.epilogue import Epilogue
from xla_ffi.cublaslt.library import missing as missing

BLOCK = 128  # elements of K that share a scale in block modes
_ROW_BYTES = 16  # cuBLASLt's 8-bit kernels load rows of x, w and y in units of this
_FINE_SCALES = 120900  # the version that brought OUTER and the modes of 128
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, group: int, block_n: int, out_dtype: str,
    transposed: bool, features: frozenset[str] = frozenset(), cc: int, x_granularity: str = "token", **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None. `x_granularity`: `block` where x has a scale for each 128 of K."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    kinds = ("int8",) if weight == "int8" else ("e4m3", "e5m2")
    if x_format not in kinds or weight not in kinds or weight == x_format == "e5m2":
        return f"it multiplies int8 by int8 and FP8 by FP8, not {x_format or 'x as it is'} by {weight}"
    if features & {"zero_point", "zero_point_real"}:
        return "it has no zero points"
    if cc < (75 if weight == "int8" else 89):
        return f"tensor cores multiply {weight} from compute capability {'7.5' if weight == 'int8' else '8.9'} on"
    if out_dtype not in _WIDTH:
        return f"it writes float32, bfloat16 or float16, not {out_dtype}"
    if k % _ROW_BYTES or n * (4 if weight == "int8" else _WIDTH[out_dtype]) % _ROW_BYTES:
        return f"rows of K={k} codes and N={n} results: cuBLASLt wants both at multiples of {_ROW_BYTES} bytes"
    reason = _unsupported_scales(k, n, weight, group, block_n, x_granularity == "block", cc)
    return reason or library.missing() or _too_old(cc)


def _unsupported_scales(k: int, n: int, weight: str, group: int, block_n: int, x_blocks: bool, cc: int) -> str | None:
    if group >= k and not x_blocks:
        return None
    if weight == "int8":
        return "an int8 sum over all of K comes back before any scale: it knows one scale a row, or in all"
    if group < k and (group != BLOCK or (block_n not in (1, BLOCK) and block_n < n)):
        return f"scales of {block_n} x {group}: it knows 1 x {BLOCK} and {BLOCK} x {BLOCK}"
    return None if cc == 90 else f"cuBLASLt has scales of {BLOCK} elements for compute capability 9.0 only"


def _too_old(cc: int) -> str | None:
    version = library.version()
    if cc == 90 and version < _FINE_SCALES:
        return f"cuBLASLt {version} has no scales finer than one in all; {_FINE_SCALES} has"
    if cc in (100, 103, 110) and version < 130200:
        return f"cuBLASLt {version} corrupts results beside concurrent kernels on this GPU; 130200 does not"
    return None


def configs(m: int, k: int, n: int, **_: Any) -> list[dict[str, int]]:
    """The first of the heuristic's results, by rank."""
    return [{"candidate": i} for i in range(CANDIDATES)]


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    group: int,
    block_n: int = 1,
    x_granularity: str = "token",
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    cc: int = 90,
    config: dict[str, int] | None = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x_scale: float32, shapes in the module's docstring.
      group, block_n: columns and rows of the weight that share a scale; K and N or more for all of them.
      x_granularity: `tensor` where all rows of `x_scale` are equal, which has a mode of its own.
      global_scale: `[]` or `[N]`, a factor of the weight.
      activation: elementwise, in float32.
      cc: compute capability.
      config: `candidate`, which of the heuristic's results runs; `fast_accum`. Empty takes the first.
      (others: the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`.
    """
    out_dtype, config = jnp.dtype(out_dtype), config or {}
    x_scale = x_scale[:1] if x_granularity == "tensor" else x_scale
    after = Epilogue(bias, activation, residual)
    scale = _scales(scale.astype(jnp.float32), global_scale, block_n, packed.shape[0])
    candidate = config.get("candidate", 0)
    if x.dtype == jnp.int8:
        assert x_scale.shape[1] == scale.shape[1] == 1, (x_scale.shape, scale.shape)
        total, _amax = multiply(Call(jnp.dtype("int32"), candidate=candidate), Operands(x, packed))
        return after.finish(total.astype(jnp.float32) * (x_scale * scale.T), out_dtype)
    plan = _plan(x, packed, x_scale, scale, cc)
    epilogue = None if plan.factor is not None or (plan.bare and not after.is_empty) else after.code(out_dtype)
    call = Call(
        out_dtype if epilogue else jnp.dtype("float32"), plan.x_mode, plan.w_mode,
        fast_accum=0 if plan.x_mode == BLOCK_1X128 else config.get("fast_accum", int(out_dtype == jnp.bfloat16)),
        epilogue=epilogue or DEFAULT, candidate=candidate,
    )  # fmt: skip
    if epilogue:
        y, _amax = multiply(call, dataclasses.replace(plan.operands, bias=bias, residual=residual))
        return y[: x.shape[0]]
    y, _amax = multiply(call, plan.operands)
    return after.finish(y[: x.shape[0]] if plan.factor is None else y * plan.factor, out_dtype)


def _scales(scale: jax.Array, global_scale: jax.Array | None, block_n: int, n: int) -> jax.Array:
    """Scales of the weight with its factor in them, and of each row where blocks of rows or the factor ask for it."""
    per_row = global_scale is not None and global_scale.ndim == 1
    if scale.shape[0] not in (1, n) and (per_row or scale.shape[1] == 1):
        scale = jnp.repeat(scale, block_n, axis=0)[:n]
    if global_scale is None:
        return scale
    return scale * (global_scale[:, None] if per_row else global_scale)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one FP8 product is put to the library.

    Attributes:
      operands: x, w and their scales, laid out for the modes; rows of x may have been added.
      factor: scales left to XLA, `[M or 1, N or 1]`.
      bare: whether the library has no epilogue for the modes.
    """

    operands: Operands
    x_mode: int = SCALAR
    w_mode: int = SCALAR
    factor: jax.Array | None = None
    bare: bool = False


def _plan(x: jax.Array, w: jax.Array, x_scale: jax.Array, scale: jax.Array, cc: int) -> _Plan:
    """The row of the module's table that fits. `scale` is `[R, G]`, R = 1, ceil(N/128) or N."""
    if scale.shape[1] > 1 or x_scale.shape[1] > 1:
        return _block_plan(x, w, x_scale, scale)
    if x_scale.size == scale.size == 1:
        return _Plan(Operands(x, w, x_scale.reshape(1), scale.reshape(1)))
    if cc == 90:
        rows, columns = jnp.broadcast_to(x_scale[:, 0], x.shape[:1]), jnp.broadcast_to(scale[:, 0], w.shape[:1])
        return _Plan(Operands(x, w, rows, columns), OUTER, OUTER)
    one = jnp.ones((1,), jnp.float32)
    return _Plan(Operands(x, w, one, one), factor=x_scale * scale.T)


def _block_plan(x: jax.Array, w: jax.Array, x_scale: jax.Array, scale: jax.Array) -> _Plan:
    """Scales of 128 elements on both sides. M becomes a multiple of 4, which the library wants."""
    (m, k), n = x.shape, w.shape[0]
    more, columns = -m % 4, -(-k // BLOCK)
    x = jnp.pad(x, ((0, more), (0, 0)))
    x_scale = jnp.pad(jnp.broadcast_to(x_scale, (m, columns)), ((0, more), (0, 0)), constant_values=1.0)
    if scale.shape[0] == n:
        per_row = jnp.broadcast_to(scale, (n, columns))
        return _Plan(Operands(x, w, x_scale.T, per_row.T), BLOCK_1X128, BLOCK_1X128, bare=True)
    blocks = jnp.broadcast_to(scale, (-(-n // BLOCK), columns))
    blocks = jnp.pad(blocks, ((0, 0), (0, -columns % 4)), constant_values=1.0)
    return _Plan(Operands(x, w, x_scale.T, blocks), BLOCK_1X128, BLOCK_128, bare=True)


def matmul_to_fp8(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    out_scale: jax.Array,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    out_dtype: Any = jnp.float8_e4m3fn,
    config: dict[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`y = round(activation(x @ w + bias) / out_scale)` in 8 bits, for a next product whose x it is.

    Args:
      x, packed: FP8 codes `[M, K]`, `[N, K]`; scale, x_scale, out_scale: float32 of one element each.
      bias: bfloat16 `[N]`; activation: relu or the tanh form of gelu.
      config: as of `matmul`.

    Returns:
      codes `[M, N]` in `out_dtype`, saturated, and float32 `[]`: the largest magnitude before `out_scale`.

    Raises:
      ValueError: an activation or a bias that the library does not have here.
    """
    epilogue = Epilogue(bias, activation).code(jnp.bfloat16)
    if epilogue is None:
        raise ValueError(
            f"activation {activation}, bias {getattr(bias, 'dtype', None)}; allowed: relu, gelu (tanh), bfloat16"
        )
    config = config or {}
    call = Call(jnp.dtype(out_dtype), fast_accum=config.get("fast_accum", 1), epilogue=epilogue,
                candidate=config.get("candidate", 0))  # fmt: skip
    one = Operands(x, packed, x_scale.reshape(1), scale.reshape(1), bias, None, (1 / out_scale).reshape(1))
    y, amax = multiply(call, one)
    assert amax is not None
    return y, amax.reshape(())
