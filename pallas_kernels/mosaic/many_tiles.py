"""Tile sizes of `matmul_many`."""

import dataclasses
import itertools
from typing import ClassVar

from pallas_kernels.mosaic.operand import BLOCK, ROWS

STRIP = 64  # rows of x whose sums are one product
STAGED = 2048  # bytes in which a warpgroup gathers what it stores
_SIZES = (128, 192, 256)
_AT_START = 168  # registers of a thread, of three warpgroups that share a multiprocessor's 65536
_DECODING = 40  # rows of x that could be multiplied while a block is decoded and its sums are scaled, about


@dataclasses.dataclass(frozen=True)
class ManyTile:
    """A configuration of `matmul_many`.

    Attributes:
      tile_m: rows of x that a program computes at a time: 128, 192 or 256.
      stages: blocks of 128 columns in flight from memory to shared memory.
      cluster: programs side by side along the weight's rows that share one copy of x, each fetching a part for all.
    """

    tile_m: int
    stages: int
    cluster: int = 1

    blocks: ClassVar[int] = 1  # of 128 columns, in a stage
    split_k: ClassVar[int] = 1
    k_groups: ClassVar[int] = 1
    row_groups: ClassVar[int] = 2
    consumers: ClassVar[int] = 2
    rows: ClassVar[int] = ROWS * 2  # of the weight
    column_rows: ClassVar[int] = ROWS * 2

    def handed_over(self, columns: int) -> tuple[int, int]:
        """Registers of a thread of the producer and of a consumer; `columns` as in `smem_of`."""
        producer = 24 if columns <= 2 else 48 + 2 * columns // 8 * 8
        return producer, (3 * _AT_START - producer) // self.consumers // 8 * 8


def smem_of(tile: ManyTile, columns: int) -> int:
    """Shared memory of a program in bytes; `columns`: 32-bit entries of a row in a block, of scales and zero points."""
    stage = tile.rows * BLOCK // 2 + tile.tile_m * 2 * BLOCK + 4 * columns * tile.column_rows
    return tile.stages * stage + tile.consumers * STAGED + 2048  # barriers


def _with_stages(tile_m: int, cluster: int, columns: int, smem: int) -> ManyTile:
    """A tile with as many stages as there is room for, five at most."""
    tiles = [ManyTile(tile_m, stages, cluster) for stages in range(2, 6)]
    return max((tile for tile in tiles if smem_of(tile, columns) <= smem), key=lambda t: t.stages, default=tiles[0])


def sizes_of(weight: str, columns: int) -> tuple[int, ...]:
    """Rows of x for which a consumer's registers suffice: tables, small groups and zero points need some."""
    return _SIZES[: 4 - columns] if weight == "int4" and columns <= 2 else _SIZES[:1]


def first_choice(m: int, n: int, weight: str, columns: int, sms: int, smem: int) -> ManyTile:
    """A first choice: the least rounds of programs, each as long as it has rows of x."""

    def cost(tile_m: int) -> int:
        return -(-(-(-m // tile_m) * -(-n // ManyTile.rows)) // sms) * (tile_m + _DECODING)

    return _with_stages(min(sizes_of(weight, columns), key=cost), 1, columns, smem)


def candidates(m: int, weight: str, columns: int, smem: int) -> list[ManyTile]:
    """Tiles worth measuring: those that fit."""
    sizes = [size for size in sizes_of(weight, columns) if size == _SIZES[0] or m > _SIZES[0]]
    found = [_with_stages(size, cluster, columns, smem) for size, cluster in itertools.product(sizes, (1, 2))]
    return [tile for tile in found if smem_of(tile, columns) <= smem]
