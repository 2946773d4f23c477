"""Rounding a matrix column by column, the columns not yet rounded making up for those that are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.grid import Grid
from qjax.quantize import to_range


def factor(hessian: jax.Array) -> jax.Array:
    """U upper triangular with `U' U = H^-1`, float32 `[K, K]`; NaN where H is not positive definite.

    By one Cholesky factorization of H in reversed order, `H = R R'` with R upper triangular, and `U = R^-1`.
    """
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]


@functools.partial(jax.jit, static_argnames=("grid", "width", "own"))
def gptq(
    w: jax.Array, upper: jax.Array, scale: jax.Array, zero: jax.Array, *, grid: Grid, width: int, own: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """GPTQ: column j is rounded, and its error `e = (w_j - w'_j) / U_jj` is taken from the columns after, `w -= e U_j`.

    Blocks of columns are updated one by one within, and the rest by one product a block.
    Source: Frantar et al., GPTQ (2023), algorithm 1.

    Args:
      w: float32 `[N, K]`, K a multiple of `width`.
      upper: `factor` of the Hessian.
      scale, zero: float32 `[N, K]`, of each weight; not looked at where `own`.
      grid: codes.
      width: columns of a block.
      own: a block is a group, which gets its scale when its first column is reached, its errors weighted by
        `1 / U_jj^2`, which is what they cost once the other columns have made up for them.

    Returns:
      Codes, scale and zero point of each weight, `[N, K]`.
    """
    n, k = w.shape

    def block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def columns(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, start, width, axis=1)

        rows = jax.lax.dynamic_slice_in_dim(upper, start, width, axis=0)
        corner = columns(rows)
        here = columns(w)
        if own:
            step, middle = (jnp.broadcast_to(a, here.shape) for a in grid.fit(here, 1 / jnp.diagonal(corner) ** 2))
        else:
            step, middle = columns(scale), columns(zero)

        def column(here: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value, s, z = here[:, i], step[:, i], middle[:, i]
            code = grid.nearest(value, s, z)
            error = (value - grid.value(code, s, z)) / corner[i, i]
            return here - error[:, None] * corner[i], (code, error)

        _, (codes, errors) = jax.lax.scan(column, here, jnp.arange(width))
        return w - jnp.matmul(errors.T, rows, precision="highest"), (codes.T, step, middle)

    _, parts = jax.lax.scan(block, w, jnp.arange(0, k, width))
    codes, scale, zero = (p.swapaxes(0, 1).reshape(n, k) for p in parts)
    return codes, scale, zero


def _slice(a: jax.Array, start: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, width, axis=1)


def _line(slope: jax.Array, direction: jax.Array, corner: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the error along a direction `[N, g]` of a block's values: half its fall at 0, half its curvature, `[N]`."""
    bent = jnp.matmul(direction, corner, precision="highest")
    return jnp.sum(slope * direction, axis=1), jnp.sum(bent * direction, axis=1)


def _step(wanted: jax.Array, fall: jax.Array, curve: jax.Array) -> jax.Array:
    """A step along a line where it makes the error smaller, else 0."""
    return jnp.where(curve * wanted**2 - 2 * fall * wanted < 0, wanted, 0.0)


def _better_grid(slope: jax.Array, corner: jax.Array, code: jax.Array, own: jax.Array, grid: Grid) -> jax.Array:
    """The scale and zero point `[N, 2]` of a block's group that are best for its codes: one after the other.

    The error is a parabola in each; the scale is rounded to the grid's dtype, the zero point to an integer.
    """
    scale, zero = own[:, :1], own[:, 1:]
    fall, curve = _line(slope, code - zero, corner)
    wanted = scale[:, 0] + fall / jnp.maximum(curve, 1e-30)
    rounded = to_range(jnp.clip(wanted, scale[:, 0] / 2, scale[:, 0] * 2), grid.dtype).astype(jnp.float32)
    change = _step(rounded - scale[:, 0], fall, curve)[:, None]
    slope = slope - change * jnp.matmul(code - zero, corner, precision="highest")
    scale = scale + change
    if not grid.symmetric:
        line = -scale * jnp.ones_like(code)
        fall, curve = _line(slope, line, corner)
        wanted = jnp.clip(zero[:, 0] + jnp.round(fall / jnp.maximum(curve, 1e-30)), 0, grid.top)
        zero = zero + _step(wanted - zero[:, 0], fall, curve)[:, None]
    return jnp.concatenate([scale, zero], axis=1)


@functools.partial(jax.jit, static_argnames=("grid", "width", "passes"))
def descend(
    w: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    hessian: jax.Array,
    *,
    grid: Grid,
    width: int,
    passes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Coordinate descent on `tr((W - W') H (W - W')')`: of each group the scale and the zero point, then each code.

    With `G = (W - W') H`, the best value of column j, all others given, is `w'_j + G_j / H_jj`, rounded to the grid.
    Source: Behdin et al., QuantEase (2023), algorithm 1, for codes; Zhang et al., COMQ (2024), for scales too.

    Args:
      w: float32 `[N, K]`, what is wanted.
      codes: float32 `[N, K]`.
      scale, zero: float32 `[N, G]`, of groups of `width`.
      hessian: float32 `[K, K]`, of positive diagonal.
      grid: codes.
      width: columns of a group, which divides K.
      passes: over all columns.

    Returns:
      Codes, scales and zero points of no larger error.
    """
    n, k = w.shape

    def block(slope: Any, item: Any) -> tuple[Any, Any]:
        start, old, scale, zero = item
        rows = jax.lax.dynamic_slice_in_dim(hessian, start, width, axis=0)
        corner, here = _slice(rows, start, width), _slice(slope, start, width)
        own = _better_grid(here, corner, old, jnp.stack([scale, zero], axis=1), grid)
        s, z = own[:, 0], own[:, 1]
        before = grid.value(old, scale[:, None], zero[:, None])
        between = grid.value(old, s[:, None], z[:, None])
        here = here - jnp.matmul(between - before, corner, precision="highest")

        def column(here: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            code = grid.nearest(between[:, i] + here[:, i] / corner[i, i], s, z)
            change = grid.value(code, s, z) - between[:, i]
            return here - change[:, None] * corner[i], code

        _, new = jax.lax.scan(column, here, jnp.arange(width))
        change = grid.value(new.T, s[:, None], z[:, None]) - before
        return slope - jnp.matmul(change, rows, precision="highest"), (new.T, s, z)

    def sweep(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, scale, zero = state
        values = grid.value(codes, jnp.repeat(scale, width, 1), jnp.repeat(zero, width, 1))
        slope: Any = jnp.matmul(w - values, hessian, precision="highest")
        blocks: Any = (jnp.arange(0, k, width), codes.reshape(n, -1, width).swapaxes(0, 1), scale.T, zero.T)
        _, (codes, scale, zero) = jax.lax.scan(block, slope, blocks)
        return codes.swapaxes(0, 1).reshape(n, k), scale.T, zero.T

    return jax.lax.fori_loop(0, passes, sweep, (codes, scale, zero))
