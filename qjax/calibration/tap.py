"""`tap`: marks what enters a layer, in the jaxpr of an unmodified model.

A primitive that gives its x back. It stays visible through jit, scan, vmap and remat, and names the kernel by being
handed it; `qjax.calibration.program` finds it there. Where the model is run as it is, nothing is left of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

tap_p = Primitive("qjax_tap")


def tap(x: jax.Array, kernel: jax.Array, contracted: tuple[int, ...], stacked: tuple[int, ...] = ()) -> jax.Array:
    """x, marked as what meets `kernel`.

    Args:
      x: any rank.
      kernel: the param itself, before it is cast or reshaped.
      contracted: axes of x that are contracted, in the order in which the kernel's run.
      stacked: axes of x that go with leading axes of the kernel.
    """
    rank = x.ndim
    return tap_p.bind(
        x, kernel, contracted=tuple(a % rank for a in contracted), stacked=tuple(a % rank for a in stacked)
    )


@tap_p.def_abstract_eval
def _abstract(x: Any, kernel: Any, **_: Any) -> Any:
    return x


mlir.register_lowering(tap_p, lambda _, x, kernel, **__: [x])


def _batched(args: Any, dims: Any, *, contracted: tuple[int, ...], stacked: tuple[int, ...]) -> Any:
    """Under vmap: more rows, or, where the kernel is batched too, one more stacked axis."""
    (x, kernel), (x_dim, kernel_dim) = args, dims
    if x_dim is None:
        x = jnp.broadcast_to(x, (kernel.shape[kernel_dim], *x.shape))
    else:
        x = jnp.moveaxis(x, x_dim, 0)
    contracted, stacked = tuple(a + 1 for a in contracted), tuple(a + 1 for a in stacked)
    if kernel_dim is not None:
        kernel, stacked = jnp.moveaxis(kernel, kernel_dim, 0), (0, *stacked)
    return tap_p.bind(x, kernel, contracted=contracted, stacked=stacked), 0


batching.primitive_batchers[tap_p] = _batched


def rows(x: jax.Array, contracted: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    """What a tap saw as `[*stacked, T, K]`."""
    kept = tuple(a for a in range(x.ndim) if a not in (*contracted, *stacked))
    lead = tuple(x.shape[a] for a in stacked)
    width = 1
    for a in contracted:
        width *= x.shape[a]
    return x.transpose(*stacked, *kept, *contracted).reshape(*lead, -1, width)


def einsum_axes_of_x(spec: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Contracted and stacked axes of the first operand of an expression `x,w->y`, as `tap` takes them."""
    operands, out = spec.replace(" ", "").split("->")
    x, w = operands.split(",")
    head, ellipsis, tail = x.partition("...")
    letters = head + "." * (rank - len(head) - len(tail)) + tail if ellipsis else x
    both = [c for c in w if c in letters and c.isalpha()]
    return tuple(letters.index(c) for c in both if c not in out), tuple(letters.index(c) for c in both if c in out)
