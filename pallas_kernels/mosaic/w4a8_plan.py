"""Static facts of one product of 4 by 8 bits on Hopper: configurations, a first choice, which program computes what."""

import dataclasses
from typing import Any

import jax

from pallas_kernels.mosaic.columns import LANES
from pallas_kernels.mosaic.lines import LINE
from pallas_kernels.mosaic.operand import BLOCK, ROWS, WORDS_A_BLOCK
from pallas_kernels.mosaic.walk import CONSUMERS, REGISTERS, SLOTS, Walk

TILE_N = CONSUMERS * ROWS
EXACT = 32  # blocks whose sums of codes stay within 22 bits, at most 8 * 128 each product
PIECE = 32  # rows of x of a piece of the result
_SIZES = (64, 96, 128, 160, 192)
_DECODING = 150  # rows of x that could be multiplied while a block is decoded and its sums are scaled, about


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel's configuration.

    Attributes:
      tile_m: rows of x of a tile, a multiple of 32, at most 192; 128 rows of the weight belong to it.
      stages: blocks of 128 columns in flight from memory to shared memory.
      cluster: 1, or 2 programs side by side along the weight's rows that share each stage's part of x.
      early: columns of a block that a consumer has still to multiply when the other's turn begins: 32, 64 or 96.
    """

    tile_m: int
    stages: int
    cluster: int
    early: int = 96

    @property
    def wide(self) -> int:
        """Rows of x for which the producer's 128 lanes bring scales: the tile's, rounded up."""
        return -(-self.tile_m // LANES) * LANES

    @property
    def smem(self) -> int:
        """Shared memory of a program in bytes, with room for barriers."""
        ring = self.stages * (self.tile_m * BLOCK + TILE_N * WORDS_A_BLOCK * 4 + 2 * 4 * TILE_N)
        return ring + CONSUMERS * SLOTS * PIECE * 2 * LINE + 4 * (self.wide + TILE_N) + 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call.

    Attributes:
      steps: blocks of 128 columns, each a stage.
      group: columns that share a scale; `scale` is its dtype.
      as_bits: whether sums are multiplied as they are, the float where they begin among them.
    """

    m: int
    n: int
    steps: int
    group: int
    scale: str
    bias: bool
    as_bits: bool
    tile: Tile
    sms: int
    interpret: bool
    consumers: int = CONSUMERS
    readers: int = CONSUMERS
    registers: tuple[int, int] = REGISTERS

    @property
    def walk(self) -> Walk:
        """Over tiles of a cluster, whose programs lie side by side along N."""
        cluster = self.tile.cluster
        along_m, along_n = -(-self.m // self.tile.tile_m), -(-self.n // (TILE_N * cluster))
        return Walk(along_m, along_n, min(self.sms // cluster, along_m * along_n))

    def place(self, program: jax.Array, i: jax.Array, of_cluster: Any) -> tuple[jax.Array, jax.Array]:
        """First row of x and of the weight of a program's i-th tile."""
        along_m, along_n = self.walk.tile(program, i)
        return along_m * self.tile.tile_m, (along_n * self.tile.cluster + of_cluster) * TILE_N


def _most_stages(tile_m: int, cluster: int, smem: int) -> Tile:
    """The tile with as many stages as there is room for, at most eight."""
    tiles = [Tile(tile_m, stages, cluster) for stages in range(2, 9)]
    return max((t for t in tiles if t.smem <= smem), key=lambda t: t.stages)


def candidates(m: int, smem: int) -> list[Tile]:
    """Tiles worth measuring."""
    sizes = [size for i, size in enumerate(_SIZES) if i == 0 or m > _SIZES[i - 1]]
    return [_most_stages(size, cluster, smem) for size in sizes for cluster in (1, 2)]


def tile_for(m: int, n: int, *, sms: int, smem: int) -> Tile:
    """A first choice: the height that leaves the fewest rows' worth of time to the busiest program, in clusters of two
    where that takes no longer. At 2048 x 22016 x 4096 an H200 took 368 us so, 424 without clusters."""

    def busiest(tile: Tile) -> tuple[int, int, int]:
        tiles = -(-m // tile.tile_m) * -(-n // (TILE_N * tile.cluster))
        time = -(-tiles // (sms // tile.cluster)) * (tile.tile_m + _DECODING)
        return time, -tile.cluster, -tile.tile_m

    return min(candidates(m, smem), key=busiest)
