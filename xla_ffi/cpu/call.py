"""The custom call: arrays as they are stored -> x @ w, or x @ w.T, in float32. Knows formats by their table alone."""

import jax
import jax.numpy as jnp
import numpy as np

from xla_ffi.cpu import library
from xla_ffi.manual_axes import result_like, vary_alike

_BLOCK = 128  # codes of a row that are packed together


def multiply(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    group: int,
    block_n: int,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
    table: tuple[float, ...] = (),
    transposed: bool = False,
    instructions: str = "",
) -> jax.Array:
    """One product, batchable by vmap: a batch is one custom call.

    Args:
      x: `[M, K]`, transposed `[M, N]`, float32, bfloat16, float16; or int8, whose scales are left to the caller.
      packed: uint32 `[N, ceil(K/128), 4*bits]`, or `[N, K]` of a byte each.
      scale: `[ceil(N/block_n), ceil(K/group)]`; zero_point: like it.
      codebook: float32 `[2**bits]`; or `table`, the same known beforehand; neither for integers and FP8.
      instructions: the set to use; by default the best that the machine has.

    Returns:
      float32 `[M, N]`; transposed `[M, K]`, K as stored, padding included.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    library.register()
    operands = vary_alike([a for a in (x, packed, scale, zero_point, codebook) if a is not None])
    n, k = packed.shape[0], packed.shape[1] * (_BLOCK if packed.ndim == 3 else 1)
    result = result_like(operands[0], (x.shape[0], k if transposed else n), jnp.float32)
    return jax.ffi.ffi_call(library.TARGET, result, vmap_method="broadcast_all")(
        *operands,
        operands=np.int32((zero_point is not None) + 2 * (codebook is not None)),
        group=np.int64(k if scale.shape[1] == 1 else group),
        block_n=np.int64(min(block_n, n)),
        table=np.array(() if codebook is not None else table, np.float32),
        transposed=transposed,
        instructions=instructions,
    )  # fmt: skip
