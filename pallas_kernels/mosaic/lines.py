"""Rows of 128 bytes in shared memory, for the copy engine and for `wgmma`."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

LINE = 128  # bytes of a row in shared memory, which the swizzle is made for


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
