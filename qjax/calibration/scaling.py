"""Factors by which columns of weights are multiplied before rounding, and x divided."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.grid import Grid
from qjax.calibration.moments import Statistics

EXPONENTS = 20  # 0, 0.05, ... below 1


def row_error(w: jax.Array, rounded: jax.Array, hessian: jax.Array) -> jax.Array:
    """`(w - w') H (w - w')'` of each row: `[N, K]` -> `[N]`."""
    left = w - rounded
    return jnp.sum(jnp.matmul(left, hessian, precision="highest") * left, axis=1)


def nearest(w: jax.Array, cost: jax.Array, grid: Grid, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounding to nearest.

    Args:
      w: float32 `[N, K]`, K a multiple of `size`.
      cost: `[K]`, what errors count in a clip search.
      grid: how groups get their scales.
      size: of a group.

    Returns:
      Codes `[N, K]`, scale and zero point `[N, G]`.
    """
    groups = w.reshape(w.shape[0], -1, size)
    scale, zero = grid.fit(groups, cost.reshape(-1, size))
    return grid.nearest(groups, scale, zero).reshape(w.shape), scale[..., 0], zero[..., 0]


def _padded(a: jax.Array, size: int) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % size)])


@functools.partial(jax.jit, static_argnames=("grids", "sizes"))
def awq(
    weights: Sequence[jax.Array], statistics: Statistics, grids: tuple[Grid, ...], sizes: tuple[int, ...]
) -> jax.Array:
    """The factors of `qjax.calibration.recipe.AWQ`, `[K]`.

    Args:
      weights: float32 `[N, K]`, those that share the input.
      statistics: of the input.
      grids, sizes: of each weight, its grid and its group.
    """
    hessian = statistics.hessian()
    mean = jnp.maximum(statistics.magnitude / statistics.tokens, 1e-8)

    def of_power(power: jax.Array) -> jax.Array:
        raised = mean**power
        return raised / jnp.sqrt(jnp.max(raised) * jnp.min(raised))

    def loss(power: jax.Array) -> jax.Array:
        factors = of_power(power)
        total = jnp.float32(0)
        for w, grid, size in zip(weights, grids, sizes, strict=True):
            n, k = w.shape
            cost = _padded(jnp.diagonal(hessian) / factors**2, size)
            codes, scale, zero = nearest(_padded(w * factors, size), cost, grid, size)
            values = grid.value(codes, jnp.repeat(scale, size, 1), jnp.repeat(zero, size, 1))
            total += jnp.sum(row_error(w, values[:, :k] / factors, hessian))
        return total

    powers = jnp.arange(EXPONENTS) / EXPONENTS
    return of_power(powers[jnp.argmin(jax.lax.map(loss, powers))])


def pooled(statistics: Statistics, groups: np.ndarray) -> Statistics:
    """Statistics with the mean magnitude of a group for each of its columns: `awq` gives them one factor then.

    Args:
      statistics: of an input.
      groups: int `[K]`, a number for each column.
    """
    return dataclasses.replace(statistics, magnitude=_means(statistics.magnitude, groups))


def shared(factors: jax.Array, groups: np.ndarray) -> jax.Array:
    """The geometric mean of a group's factors, for each of its columns `[K]`."""
    return jnp.exp(_means(jnp.log(factors), groups))


def _means(values: jax.Array, groups: np.ndarray) -> jax.Array:
    counts = np.maximum(np.bincount(groups), 1)
    return (jax.ops.segment_sum(values, groups, len(counts)) / counts)[groups]


@functools.partial(jax.jit, static_argnames="strength")
def smoothquant(weights: Sequence[jax.Array], statistics: Statistics, strength: float) -> jax.Array:
    """The factors of `qjax.calibration.recipe.SmoothQuant`, `[K]`; 1 for columns that are 0 on either side."""
    heaviest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(w), axis=0) for w in weights])
    peak = statistics.peak
    factors = peak**strength / jnp.maximum(heaviest, 1e-30) ** (1 - strength)
    return jnp.where((peak > 0) & (heaviest > 0), jnp.clip(factors, 1e-5, 1e5), 1.0)
