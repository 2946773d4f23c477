"""The custom call: arrays as cuBLASLt wants them -> y. Knows no scheme, and pads nothing.

    y = residual + epilogue(scales * x @ w^T + bias)

Scale modes and their layouts, of x `[M, K]` (of w read N for M):

    SCALAR       float32 [1] or more, of which the first counts
    OUTER        float32 [M] or more
    BLOCK_1X128  float32 [ceil(K/128), M]: rows of x lie side by side
    BLOCK_128    float32 [ceil(N/128), ceil(K/128) rounded up to 4], of w alone
    VEC32_E8M0   uint8, VEC16_E4M3 uint8: tiles of 128 x 4, see `microscaling.swizzle`

A wrong layout is a wrong answer, not an error. The workspace is a second result that nobody reads: XLA places it in
its temporary memory and shares it between calls, where a scratch allocator would keep a call out of CUDA graphs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from xla_ffi.cublaslt import library
from xla_ffi.manual_axes import result_like, vary_alike

# cublasLtMatmulMatrixScale_t
SCALAR, VEC16_E4M3, VEC32_E8M0, OUTER, BLOCK_1X128, BLOCK_128 = range(6)

# cublasLtEpilogue_t; BIAS is added to another.
DEFAULT, RELU, BIAS, GELU_TANH = 1, 2, 4, 32

WORKSPACE = 32 * 2**20  # bytes: what cuBLAS recommends for Hopper and later

CANDIDATES = 4  # of the heuristic's results, how many are worth timing


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call.

    Attributes:
      out_dtype: of y.
      x_mode, w_mode: scale modes.
      fast_accum: 1 lets FP8 sums keep fewer bits between tensor core steps (relative error about 1.3e-3 more).
      epilogue: an activation, plus `BIAS` where there is one.
      candidate: which of the heuristic's results runs; the last where there are fewer.
    """

    out_dtype: np.dtype
    x_mode: int = SCALAR
    w_mode: int = SCALAR
    fast_accum: int = 0
    epilogue: int = DEFAULT
    candidate: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """The arrays of a call, each with the same number of leading axes; an axis of 1 broadcasts.

    Attributes:
      x: `[.., M, K]`; w: `[.., N, K]`; K at multiples of 16 bytes. uint8 holds two e2m1 codes, the first one low.
      x_scale, w_scale: by mode; None for operands that are no FP8 or FP4.
      bias: `[.., N]`, in y's dtype; residual: `[.., M, N]`, in y's dtype.
      out_scale: float32 `[.., 1]`, multiplies a y of 8 bits.
    """

    x: jax.Array
    w: jax.Array
    x_scale: jax.Array | None = None
    w_scale: jax.Array | None = None
    bias: jax.Array | None = None
    residual: jax.Array | None = None
    out_scale: jax.Array | None = None


_ROLES = ("x_scale", "w_scale", "bias", "residual", "out_scale")  # the order that handlers.cc reads
_SCALES = ("x_scale", "w_scale", "out_scale")


def multiply(call: Call, o: Operands) -> tuple[jax.Array, jax.Array | None]:
    """One product, batchable by vmap: a batch is one custom call that launches once for each of its elements.

    Returns:
      y `[.., M, N]`, and with `out_scale` the largest magnitude of y before that scale, float32 `[.., 1]`, else None.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    library.register()
    return _batchable(call)(o)


def variant() -> str:
    """What runs the products, for `explain`."""
    return f"cuBLASLt {library.version()}, {WORKSPACE // 2**20} MiB of workspace"


@functools.cache
def _batchable(call: Call) -> Any:
    @custom_vmap
    def launch(o: Operands) -> tuple[jax.Array, jax.Array | None]:
        return _launch(call, o)

    @launch.def_vmap
    def batched(size: int, in_batched: tuple[Operands], o: Operands) -> Any:
        del size
        led = jax.tree.map(lambda is_batched, a: a if is_batched else a[None], in_batched[0], o)
        aligned = {name: _aligned(a) for name in _SCALES if (a := getattr(led, name)) is not None}
        y = launch(dataclasses.replace(led, **aligned))
        return y, jax.tree.map(lambda _: True, y)

    return launch


def _aligned(scale: jax.Array) -> jax.Array:
    """A batch of scales each of which starts at a multiple of 16 bytes, where the library looks for it."""
    more = -scale.shape[-1] % (16 // scale.dtype.itemsize)
    return jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, more)]) if more else scale


def _launch(call: Call, o: Operands) -> tuple[jax.Array, jax.Array | None]:
    o, axes = vary_alike(o), o.x.ndim - 2
    given = {name: a for name in _ROLES if (a := getattr(o, name)) is not None}
    lead = np.broadcast_shapes(*(a.shape[:axes] for a in (o.x, o.w, *given.values())))
    results = [
        result_like(o.x, (*lead, o.x.shape[-2], o.w.shape[-2]), call.out_dtype),
        result_like(o.x, (WORKSPACE,), jnp.uint8),
    ]
    if o.out_scale is not None:
        results.append(result_like(o.x, (*lead, 4), jnp.float32))  # of 16 bytes the first 4
    attributes = {f.name: np.int32(getattr(call, f.name)) for f in dataclasses.fields(call) if f.name != "out_dtype"}
    operands = sum(1 << i for i, name in enumerate(_ROLES) if name in given)
    y, _, *amax = jax.ffi.ffi_call(library.TARGET, results)(
        o.x, o.w, *given.values(), operands=np.int32(operands), **attributes
    )
    return y, amax[0][..., :1] if amax else None
