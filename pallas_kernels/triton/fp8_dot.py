"""The FP8 dot of Hopper's `wgmma`, which Pallas' own dot does not reach.

Triton's dot carries a limit on how many products the hardware may sum before the sum is promoted to float32
(`max_num_imprecise_acc`). Pallas leaves it at 0, which Triton takes as "never imprecisely" and meets by turning both
operands into float16 for the older `mma`, at half the rate of 16 bits. Here the limit is out of the way and the caller
promotes: a dot is short, 128 products, and its result is added in float32.

JAX offers no door for this, so a primitive is registered with Pallas' private lowering rules: if they move, this module
does not import, and with it the kernels that need it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib.triton import dialect as tt_dialect  # type: ignore[attr-defined]
from jax._src.pallas.triton import lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir

_UNLIMITED = 2**30

_dot_p = Primitive("qjax_fp8_dot")


def fp8_dot(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """`total + a @ b.T` in a Pallas-Triton kernel; on Hopper the sum keeps as little as 14 bits of its largest term.

    Args:
      a: float8_e4m3fn `[P, K]`, K short; b: of the same dtype `[Q, K]`; total: float32 `[P, Q]`.
    """
    return _dot_p.bind(a, b, total)


def _exact(a: jax.Array, b: jax.Array, total: jax.Array) -> jax.Array:
    """What the primitive means, for machines that interpret."""
    return total + jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@_dot_p.def_abstract_eval
def _abstract(a: Any, b: Any, total: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(total.shape, total.dtype)


_dot_p.def_impl(_exact)
mlir.register_lowering(_dot_p, mlir.lower_fun(_exact, multiple_results=False))


@lowering.register_lowering(_dot_p)
def _lower(ctx: Any, a: Any, b: Any, total: Any) -> Any:
    """One `tt.dot`."""
    return tt_dialect.dot(a, tt_dialect.trans(b, (1, 0)), total, max_num_imprecise_acc=_UNLIMITED)
