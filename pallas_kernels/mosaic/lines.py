"""Rows of 128 bytes in shared memory, for the copy engine and for `wgmma`; the order in which tiles are computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

LINE = 128  # bytes of a row in shared memory, which the swizzle is made for
BAND = 16  # tiles along x that neighbours in time lie in


def tiled(dtype: Any) -> tuple[Any, Any]:
    """How `wgmma` wants rows of 128 bytes: tiles of eight of them, swizzled."""
    tiling = plgpu.TilingTransform((8, LINE // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(LINE)  # type: ignore[abstract]


def in_lines(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    """Rows of 128 bytes in shared memory under two names: rows, swizzled, and `tiled`, which are the same bytes. The
    copy engine cuts arrays of any size into rows, into tiles only those that are made of them."""
    tiles = plgpu.SMEM(shape, dtype, transforms=tiled(dtype))
    return tiles if interpret else plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=tiled(dtype)[1:]), tiles)


def views(ref: Any, interpret: bool) -> tuple[Any, Any]:
    """An array of `in_lines` as the copy engine sees it, and as registers and `wgmma` do."""
    return (ref, ref) if interpret else ref


def in_bands(number: jax.Array, along_x: int, along_w: int, high: int) -> tuple[jax.Array, jax.Array]:
    """Where tile `number` lies along x and the weight: in bands of `high`; those that run together share both."""
    band, inside = jax.lax.div(number, high * along_w), jax.lax.rem(number, high * along_w)
    height = jnp.minimum(along_x - band * high, high)
    return band * high + jax.lax.rem(inside, height), jax.lax.div(inside, height)


def count_of(tiles: int, programs: int, program: jax.Array) -> jax.Array:
    """How many of all tiles a program computes, each `programs` after the other."""
    return jax.lax.div(tiles - program + programs - 1, jnp.int32(programs))
