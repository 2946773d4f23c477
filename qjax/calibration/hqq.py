"""HQQ: real zero points, moved until few weights are far off; no data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.grid import Grid

NORM, WEIGHT, GROWTH, STEPS = 0.7, 10.0, 1.01, 20  # p, b and its growth, as in the authors' code


@functools.partial(jax.jit, static_argnames=("grid", "size"))
def hqq(w: jax.Array, grid: Grid, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes and real zero points by the formula of `qjax.calibration.recipe.HQQ`; the best zero point met is kept.

    Args:
      w: float32 `[N, K]`, K a multiple of `size`.
      grid: asymmetric; its scales stay as they are, zero points are rounded to its dtype.
      size: of a group.

    Returns:
      Codes `[N, K]`, scale and zero point `[N, G]`, float32.
    """
    groups = w.reshape(w.shape[0], -1, size)
    scale, _ = grid.fit(groups, jnp.ones(()))
    low = jnp.min(jnp.minimum(groups, 0), axis=-1, keepdims=True)

    def codes(zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(groups / scale + zero), 0, grid.top)

    def move(state: Any, weight: jax.Array) -> tuple[Any, None]:
        zero, least, best = state
        q = codes(zero)
        error = groups - grid.value(q, scale, zero)
        size_of = jnp.abs(error)
        total = jnp.mean(size_of, axis=-1, keepdims=True)
        best, least = jnp.where(total < least, zero, best), jnp.minimum(total, least)
        shrunk = jnp.sign(error) * jnp.maximum(size_of - jnp.maximum(size_of, 1e-8) ** (NORM - 1) / weight, 0)
        moved = jnp.mean(q - (groups - shrunk) / scale, axis=-1, keepdims=True)
        return (moved.astype(grid.dtype).astype(jnp.float32), least, best), None

    start = (-low / scale).astype(grid.dtype).astype(jnp.float32)
    weights = WEIGHT * GROWTH ** jnp.arange(STEPS + 1)
    (_, _, zero), _ = jax.lax.scan(move, (start, jnp.full_like(start, jnp.inf), start), weights)
    return codes(zero).reshape(w.shape), scale[..., 0], zero[..., 0]
