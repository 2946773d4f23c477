"""Which elements of an array in registers a lane holds, by the layout that Mosaic GPU has it in."""

from typing import Any

import numpy as np


def places(layout: Any, shape: tuple[int, int]) -> np.ndarray:
    """Flat index of each element that a lane holds: `[warp, lane, register, element of the register]`."""
    layout, of = layout.to_mgpu(), np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, last = of.shape[: -len(tile)], of.shape[-len(tile) :]
        of = of.reshape(*lead, *(n for size, t in zip(last, tile, strict=True) for n in (size // t, t)))
        first = len(lead)
        outer, inner = range(first, of.ndim, 2), range(first + 1, of.ndim, 2)
        of = of.transpose(*range(first), *outer, *inner)
    taken = (*layout.warp_dims, *layout.lane_dims, layout.vector_dim)
    rest = [axis for axis in range(-of.ndim, 0) if axis not in taken]
    of = of.transpose([a % of.ndim for a in (*layout.warp_dims, *layout.lane_dims, *rest, layout.vector_dim)])
    return of.reshape(4, 32, -1, of.shape[-1])
