"""Static facts of one product on Hopper: what its programs, their stages and the products in these are."""

import dataclasses
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.operand import BLOCK
from pallas_kernels.mosaic.tiles import Tile

_EXACT_FACTORS = ("float8_e8m0fnu", "float8_e4m3fn")


def entries_of(group: int, zero_point: bool) -> int:
    """32-bit entries of a row in a block: of scales and of zero points."""
    return max(1, BLOCK // group) * (1 + zero_point)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call."""

    m: int
    n: int
    blocks: int  # of 128 columns along K
    weight: str
    scale: str  # dtype of the scales
    group: int  # elements that share a scale; all of K, rounded up, where a row has one
    zeros: bool
    tile: Tile
    interpret: bool

    @property
    def groups(self) -> int:
        """Those of a block of 128."""
        return max(1, BLOCK // self.group)

    @property
    def scales_values(self) -> bool:
        """Whether scales multiply the values."""
        return self.weight == "e2m1" and self.scale in _EXACT_FACTORS

    @property
    def pieces(self) -> int:
        """Products that a block is cut into: one for each group with a scale of its own."""
        return 1 if self.scales_values else self.groups

    @property
    def width(self) -> int:
        """Columns of a product."""
        return BLOCK // self.pieces

    @property
    def rounds(self) -> int:
        """Stages that a program has: as many for each of its warpgroups along K."""
        tile = self.tile
        return -(-self.blocks // (tile.blocks * tile.split_k * tile.k_groups)) * tile.k_groups

    @property
    def grid(self) -> tuple[int, int, int]:
        """Clusters along M, N and K. Neighbours share their rows of the weight, which come from memory once."""
        tile = self.tile
        return -(-self.m // tile.tile_m), -(-self.n // (tile.rows * tile.cluster)), tile.split_k

    @property
    def swizzle(self) -> tuple[Any, Any]:
        """How x lies in shared memory: in tiles of as many columns as a product has, at most 64."""
        width = min(64, self.width)
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)  # type: ignore[abstract]
