"""Static facts of one product of 8 by 8 bits on Hopper: configurations, a first choice, which program computes what."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.mosaic.columns import LANES
from pallas_kernels.mosaic.lines import LINE
from pallas_kernels.mosaic.operand import ROWS
from pallas_kernels.mosaic.walk import BAND, CONSUMERS, REGISTERS, SLOTS, Walk

STEP = 128  # columns of K of a stage: a row of it is what the swizzle is made for
TILE_M = CONSUMERS * ROWS
_SIZES = (64, 128, 192, 256)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel's configuration.

    Attributes:
      tile_n: rows of the weight of a tile, a multiple of 64, at most 256; 128 rows of x belong to it.
      stages: in flight from memory to shared memory.
      cluster: 1, or 2 programs that share each stage's part of the weight.
    """

    tile_n: int
    stages: int
    cluster: int

    @property
    def wide(self) -> int:
        """Rows of the weight for which the producer's 128 lanes bring scales: the tile's, rounded up."""
        return -(-self.tile_n // LANES) * LANES

    @property
    def smem(self) -> int:
        """Shared memory of a program in bytes, with room for barriers."""
        ring = self.stages * (TILE_M + self.tile_n) * STEP
        return ring + CONSUMERS * SLOTS * ROWS * LINE + 4 * (TILE_M + 2 * self.wide) + 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call."""

    m: int
    n: int
    k: int
    bias: bool
    tile: Tile
    sms: int
    interpret: bool
    consumers: int = CONSUMERS
    readers: int = CONSUMERS
    registers: tuple[int, int] = REGISTERS

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return -(-self.k // STEP)

    @property
    def walk(self) -> Walk:
        """Over tiles of a cluster, whose programs lie side by side along M."""
        cluster = self.tile.cluster
        along_m, along_n = -(-self.m // (TILE_M * cluster)), -(-self.n // self.tile.tile_n)
        return Walk(along_m, along_n, min(self.sms // cluster, along_m * along_n), BAND // cluster)

    def place(self, program: jax.Array, i: jax.Array, of_cluster: Any) -> tuple[jax.Array, jax.Array]:
        """First row of x and of the weight of a program's i-th tile."""
        along_m, along_n = self.walk.tile(program, i)
        return (along_m * self.tile.cluster + of_cluster) * TILE_M, along_n * self.tile.tile_n


def _most_stages(tile_n: int, cluster: int, smem: int) -> Tile:
    """The tile with as many stages as there is room for, at most eight."""
    tiles = [Tile(tile_n, stages, cluster) for stages in range(2, 9)]
    return max((t for t in tiles if t.smem <= smem), key=lambda t: t.stages)


def _widest(weight: str) -> int:
    """Columns of a tile that a consumer's registers have room for: e4m3 has two sums."""
    return 256 if weight == "int8" else 192


def candidates(m: int, weight: str, smem: int) -> list[Tile]:
    """Tiles worth measuring."""
    found: list[Tile] = []
    for size in (size for size in _SIZES if size <= _widest(weight)):
        for cluster in (1, 2) if m > TILE_M else (1,):
            tile = _most_stages(size, cluster, smem)
            found += dict.fromkeys((tile, dataclasses.replace(tile, stages=max(2, tile.stages - 1))))
    return found


def tile_for(m: int, n: int, *, weight: str, sms: int, smem: int) -> Tile:
    """A first choice: the width that leaves the fewest columns' worth of time to the busiest program."""

    def busiest(size: int) -> tuple[int, int]:
        tiles = -(-m // TILE_M) * -(-n // size)
        return -(-tiles // sms) * (size + 16), -size  # 16: what begins and ends a tile

    sizes = [size for size in _SIZES if size <= _widest(weight)]
    return _most_stages(min(sizes, key=busiest), 1, smem)
