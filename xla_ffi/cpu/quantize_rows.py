"""x -> int8 codes and a scale a row, on a CPU, in one call that reads x twice, the second time from the cache.

    scale[m] = amax(|x[m]|) / 127, 1 where that is 0;  codes[m, k] = round(x[m, k] / scale[m]), half to even

XLA makes several loops of the formula and shares even short ones among its threads, which takes longer than they do.
"""

from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cpu import library
from xla_ffi.manual_axes import result_like, vary_alike


def unsupported(k: int, dtype: Any, unit: int, cc: int) -> str | None:
    """Why rows of k elements cannot be quantized so, or None; `cc` is of no matter here."""
    if jnp.dtype(dtype) != jnp.int8:
        return f"it makes codes in int8, not in {jnp.dtype(dtype).name}"
    if unit < k:
        return f"it makes a scale a row, not one for each {unit} of its {k} elements"
    return library.missing()


def quantize_rows(x: jax.Array, dtype: Any, unit: int, *, instructions: str = "") -> tuple[jax.Array, jax.Array]:
    """Codes and scales of x.

    Args:
      x: bfloat16, float16 or float32 `[M, K]`.
      dtype: int8; unit: K or more.
      instructions: the set to use; by default the best that the machine has.

    Returns:
      `(codes int8 [M, K], scale float32 [M, 1])`.

    Raises:
      RuntimeError: the library of handlers is not built, or does not load.
    """
    library.register()
    (x,) = vary_alike([x])
    results = (result_like(x, x.shape, jnp.int8), result_like(x, (x.shape[0], 1), jnp.float32))
    codes, scale = jax.ffi.ffi_call(library.QUANTIZE_ROWS, results)(x, instructions=instructions)
    return codes, scale
