"""Static facts of one product with folded scales: configurations, a first choice, which program computes what."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.columns import LANES
from pallas_kernels.mosaic.operand import BLOCK, ROWS, WORDS_A_BLOCK
from pallas_kernels.mosaic.walk import Walk
from pallas_kernels.pairs import RAISED, TABLES

HALF = BLOCK // 2  # columns of a product
_STAGED = 2048  # bytes in which a consumer gathers what it stores
_APART = 1024  # bytes in shared memory, at multiples of which arrays begin
_BARRIERS = 512  # bytes that they take at most
_SHAPES = ((2, 1), (3, 1), (1, 2), (2, 2), (1, 4))  # row_groups, k_groups
_SIZES = (32, 64, 128, 192, 256)
# Rows of x whose sums a consumer's thread has registers for, by consumers; with more than four scales a block.
_WIDEST, _WIDEST_OF_MANY = {2: 256, 3: 128, 4: 64}, {2: 192, 3: 64, 4: 32}
_START = 60  # rows of x that could be multiplied while a tile begins and ends, for each 64 rows of the weight


BYTES = ("int8", "e4m3")


def words_of(weight: str) -> int:
    """Words of a row's block."""
    return BLOCK // 4 if weight in BYTES else WORDS_A_BLOCK


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel's configuration.

    Attributes:
      tile_m: rows of x of a tile.
      row_groups: consumers side by side along the weight's rows, 64 rows each.
      k_groups: consumers one behind the other along K, each with every so manieth stage; their sums meet at the end.
      blocks: of 128 columns, in a stage: rows of 64 bytes of codes come slower than rows of 128.
      stages: in flight from memory to shared memory, two or more for each of `k_groups`.
      cluster: 1, or 2 programs side by side along the weight's rows that share each stage's part of x.
    """

    tile_m: int
    row_groups: int
    k_groups: int
    blocks: int
    stages: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return ROWS * self.row_groups

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.row_groups * self.k_groups

    @property
    def column_rows(self) -> int:
        """Rows for which the producer's 128 lanes bring scales: those of the weight, rounded up."""
        return -(-self.rows // LANES) * LANES

    @property
    def wide(self) -> int:
        """Rows of x for which they do."""
        return -(-self.tile_m // LANES) * LANES

    def smem(self, weight: str, entries: int, bias: bool = False) -> int:
        """Shared memory of a program in bytes, with room for barriers; `entries` of 32 bits, of a row in a block."""
        blocks, rows = self.stages * self.blocks, self.column_rows
        arrays = (
            blocks * self.tile_m * BLOCK * 2,
            blocks * self.rows * words_of(weight) * 4,
            (blocks * entries + self.stages) * rows * 4,
            (self.k_groups - 1) * self.rows * self.tile_m * 4,
            self.row_groups * _STAGED,
            self.wide * 4,
            bias * rows * 4,
        )
        return sum(-(-size // _APART) * _APART for size in arrays) + _BARRIERS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer and of a consumer."""
        at_start = 65536 // (LANES * (self.consumers + 1)) // 8 * 8
        producer = min(at_start, 72 if self.consumers == 2 else 64)
        return producer, min(240, (at_start * (self.consumers + 1) - producer) // self.consumers // 8 * 8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call.

    Attributes:
      blocks: of 128 columns along K.
      weight: "int4", "int8", "e4m3", or a key of `pallas_kernels.pairs.TABLES`.
      group: columns that share a scale; `scale` is its dtype.
      zeros, x_scaled, bias: whether there are such operands.
    """

    m: int
    n: int
    blocks: int
    weight: str
    group: int
    scale: str
    zeros: bool
    x_scaled: bool
    bias: bool
    tile: Tile
    sms: int
    interpret: bool

    @property
    def rounds(self) -> int:
        """Stages of a tile."""
        return -(-self.blocks // self.tile.blocks)

    @property
    def steps(self) -> int:
        """Stages by which tiles follow one another: each of a ring's is always the same consumers'."""
        return -(-self.rounds // self.tile.k_groups) * self.tile.k_groups

    @property
    def groups(self) -> int:
        """Of a block."""
        return max(1, BLOCK // self.group)

    @property
    def entries(self) -> int:
        """Of a row in a stage: a pair for each scale, one for each zero point, and a power of two, the last."""
        return self.tile.blocks * self.groups * (1 + self.zeros) + 1

    @property
    def words(self) -> int:
        """Of a row's block."""
        return words_of(self.weight)

    @property
    def raised(self) -> int:
        """By which power of two scales are raised; 0 where codes are decoded first."""
        return 0 if self.zeros else RAISED.get(self.weight, 0)

    @property
    def largest(self) -> int:
        """The exponent of a row's largest scale: values are below 2^15 then, raised scales as well."""
        return 14 - self.raised if self.raised else 10

    @property
    def scale_bytes(self) -> int:
        """Of one."""
        return jnp.dtype(self.scale).itemsize

    @property
    def exact(self) -> bool:
        """Whether values are float16 numbers without a power of two: those of NVFP4."""
        return self.scale == "float8_e4m3fn" and not self.raised and not self.zeros

    @property
    def ahead(self) -> int:
        """Stages whose scales the producer's lanes have asked for before they need them."""
        words = -(-self.tile.blocks * self.groups * (self.scale_bytes + self.zeros) // 4)
        return max(1, min(4, 8 * LANES // (words * self.tile.column_rows)))

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.tile.consumers

    @property
    def readers(self) -> int:
        """Those that read one stage."""
        return self.tile.row_groups

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer and of a consumer."""
        return self.tile.registers

    @property
    def walk(self) -> Walk:
        """Over tiles of a cluster, whose programs lie side by side along N."""
        cluster = self.tile.cluster
        along_m, along_n = -(-self.m // self.tile.tile_m), -(-self.n // (self.tile.rows * cluster))
        return Walk(along_m, along_n, min(self.sms // cluster, along_m * along_n))

    def place(self, program: jax.Array, i: jax.Array, of_cluster: Any) -> tuple[jax.Array, jax.Array]:
        """First row of x and of the weight of a program's i-th tile."""
        along_m, along_n = self.walk.tile(program, i)
        return along_m * self.tile.tile_m, (along_n * self.tile.cluster + of_cluster) * self.tile.rows


def piece_of(itemsize: int) -> int:
    """Rows of x of a piece of the result, of elements of `itemsize` bytes, on its way to memory."""
    return _STAGED // (ROWS * itemsize)


def _most_stages(tile: Tile, weight: str, entries: int, smem: int) -> Tile:
    """The tile with as many stages as there is room for, at most twelve."""
    step = tile.k_groups
    tiles = [dataclasses.replace(tile, stages=stages) for stages in range(max(2, step), 13, step)]
    return max((t for t in tiles if t.smem(weight, entries) <= smem), key=lambda t: t.stages, default=tiles[0])


def candidates(m: int, k: int, weight: str, entries: int, smem: int) -> list[Tile]:
    """Tiles worth measuring; `weight` and `entries` as in `Tile.smem`."""
    widest = _WIDEST if entries <= 4 else _WIDEST_OF_MANY
    if weight in TABLES:  # which takes registers, too
        widest = widest | {2: _WIDEST_OF_MANY[2]}
    least = min((size for size in _SIZES if size >= m), default=_SIZES[-1])
    sizes = [size for size in _SIZES if least // 2 <= size <= least]
    found = []
    for tile_m, (row_groups, k_groups), blocks, cluster in itertools.product(sizes, _SHAPES, (1, 2), (1, 2)):
        tile = Tile(tile_m, row_groups, k_groups, blocks, 0, cluster)
        clustered = cluster == 1 or (tile_m > 64 and k_groups == 1)
        if tile_m <= widest[tile.consumers] and (blocks == 2 or tile_m > 64) and clustered:
            found.append(_most_stages(tile, weight, entries, smem))
    fit = [tile for tile in found if tile.smem(weight, entries) <= smem]
    fit = [tile for tile in fit if tile.stages >= 2 * tile.k_groups and tile.stages * tile.blocks > 2 * tile.k_groups]
    return [tile for tile in fit if tile.k_groups == 1 or tile.k_groups * tile.blocks * BLOCK < k]


def with_room(tile: Tile, weight: str, entries: int, bias: bool, smem: int) -> Tile:
    """The tile, with a stage less of each consumer's where the bias leaves no room for it."""
    over = tile.smem(weight, entries, bias) > smem
    return dataclasses.replace(tile, stages=tile.stages - tile.k_groups) if over else tile


def tile_for(m: int, n: int, k: int, weight: str, entries: int, *, sms: int, smem: int) -> Tile:
    """A first choice: the least time of the busiest program."""

    def busiest(tile: Tile) -> tuple[int, int, int]:
        tiles = -(-m // tile.tile_m) * -(-n // (tile.rows * tile.cluster))
        time = -(-tiles // (sms // tile.cluster)) * tile.row_groups * (tile.tile_m + _START)
        return time, tile.cluster if weight in BYTES else -tile.cluster, -tile.tile_m

    return min(candidates(m, k, weight, entries, smem), key=busiest)
