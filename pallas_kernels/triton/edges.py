"""Tiles at the edges of arrays: what lies past them is loaded as zeros. An axis that tiles divide needs no test."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def inside(
    shape: tuple[int, ...], first: tuple[Any, ...], size: tuple[int, ...], step: tuple[int, ...] | None = None
) -> jax.Array | None:
    """Which elements of a tile lie inside an array; None where all of every tile do.

    Args:
      shape: of a tile; first: where it begins; size: of the array.
      step: how far apart tiles lie, or wholes of which they are equal parts, where that is not their shape.
    """
    tests = [
        first[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size[axis]
        for axis in range(len(shape))
        if size[axis] % (step or shape)[axis]
    ]
    return functools.reduce(jnp.logical_and, tests) if tests else None


def load(
    ref: Any,
    first: tuple[Any, ...],
    shape: tuple[int, ...],
    step: tuple[int, ...] | None = None,
    policy: str | None = None,
) -> jax.Array:
    """A tile of an array, zeros past its edges.

    Args:
      first, shape, step: as `inside`.
      policy: "evict_first" for what is read once and need not stay in the L2.
    """
    mask = inside(shape, first, ref.shape, step)
    at = ref.at[tuple(pl.ds(*pair) for pair in zip(first, shape, strict=True))]
    return plgpu.load(at, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype), eviction_policy=policy)
