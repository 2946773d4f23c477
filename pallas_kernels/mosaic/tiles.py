"""Tile sizes: what one program of the Hopper kernels computes, and a first choice of it from the shape and the chip."""

import dataclasses
import itertools

ROWS = 64  # of the weight, a warpgroup
_REGISTERS = 65536  # of a multiprocessor
BLOCK = 128  # columns of K: 64 bytes of a row's codes

_CLUSTERS = {32: (1, 2), 64: (1, 2), 128: (1, 2, 4)}  # by rows of x, worth trying where x is a good part of the bytes


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel's configuration.

    Attributes:
      tile_m: rows of x a program computes: 8, 16, 32, 64 or 128, a side of `wgmma`.
      row_groups: warpgroups side by side along the weight's rows, 64 rows each.
      k_groups: warpgroups one behind the other along K, each with every so manieth stage; their sums meet at the end.
      split_k: programs that share an output tile, each with a part of K.
      stages: in flight from memory to shared memory; a multiple of `k_groups`.
      blocks: of 128 columns, in a stage.
      cluster: programs side by side along the weight's rows that share one copy of x, each fetching a part for all.
      ahead: 1 where a warpgroup decodes the next piece while one is multiplied, 0 where it waits: fewer registers.
    """

    tile_m: int
    row_groups: int
    k_groups: int
    split_k: int
    stages: int
    blocks: int
    ahead: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        """Rows of the weight that a program computes."""
        return ROWS * self.row_groups

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply; one more brings what they need."""
        return self.row_groups * self.k_groups

    @property
    def needs(self) -> int:
        """Registers of a consumer's thread, more or less: totals, sums and values of one piece or two, the rest."""
        return self.tile_m // 2 + (1 + self.ahead) * (self.tile_m // 2 + 32) + 44

    @property
    def registers(self) -> int:
        """Registers of a thread as the kernel starts, where all threads have as many."""
        return min(255, _REGISTERS // (128 * (self.consumers + 1)) // 8 * 8)

    def handed_over(self, columns: int) -> tuple[int, int]:
        """Registers of a thread of the producer and of a consumer, once the one has given the others what it can spare.

        The producer keeps `columns` 32-bit entries of each of a lane's rows and of each block.
        """
        entries = columns * self.blocks * self.column_rows // 128
        producer = min(self.registers, 64 + 2 * entries // 8 * 8)
        left = self.registers * (self.consumers + 1) - producer
        return producer, min(240, left // self.consumers // 8 * 8)

    def fits_registers(self, columns: int) -> bool:
        """Whether a consumer's thread has the registers that it needs."""
        return self.needs <= max(self.registers, self.handed_over(columns)[1])

    @property
    def column_rows(self) -> int:
        """Rows for which the producer's 128 lanes bring scales: those, rounded up."""
        return -(-self.rows // 128) * 128


def smem_of(tile: Tile, columns: int) -> int:
    """Shared memory of a program in bytes; `columns`: 32-bit entries of a row in a block, of scales and zero points."""
    block = tile.rows * BLOCK // 2 + tile.tile_m * 2 * BLOCK + 4 * columns * tile.column_rows
    sums = (tile.k_groups - 1) * tile.rows * tile.tile_m * 4
    return (
        tile.stages * tile.blocks * block + sums + tile.rows * tile.tile_m * 4 + 8 * 1024
    )  # alignment of each array to 1024


def _with_stages(tile: Tile, columns: int, room: int) -> Tile:
    """The tile with as many stages as there is room for: at most six a warpgroup along K, one at least."""
    step = tile.k_groups
    fits = [s for s in range(step, 6 * step + 1, step) if smem_of(dataclasses.replace(tile, stages=s), columns) <= room]
    return dataclasses.replace(tile, stages=max(fits, default=step))


def _ahead_if_it_fits(tile: Tile, columns: int) -> Tile:
    ahead = dataclasses.replace(tile, ahead=1)
    return ahead if ahead.fits_registers(columns) else tile


def decode_tile(m: int, n: int, k: int, columns: int, sms: int, smem: int) -> Tile:
    """A first choice: what was fastest on an H200 at 22016x4096, 8192x8192 and 4096x4096, by how it fills the chip.

    One wave of programs, each with two to four consumer warpgroups; for more than 64 rows of x the largest tile of
    which there are half as many as multiprocessors. Shares of K cost a second launch, which adds them: for weights that
    leave half of the chip idle, or three quarters where rows are few. Up to 32 rows half of the shared memory at most,
    where that leaves two stages: the next launch's programs fit beside this one's and start while it ends.
    """
    tile_m = min(128, max(8, 1 << (m - 1).bit_length()))
    row_groups = 2 if m > 64 else min(3, -(-n // (ROWS * sms)))
    if m > 64 and 2 * -(-n // (2 * ROWS)) * -(-m // tile_m) <= sms:
        row_groups = 1
        if 2 * -(-n // ROWS) * -(-m // tile_m) <= sms:
            tile_m = 64
    blocks = 1 if m > 64 or (m > 32 and row_groups == 3) else 2
    tiles, rounds = -(-n // ROWS) * -(-m // tile_m), -(-k // (BLOCK * blocks))
    split_k = 1
    while (2 if tile_m == 64 else 4) * split_k * tiles <= sms and rounds // (2 * split_k) >= 4:
        split_k *= 2
    k_groups = {1: 2 if m > 32 else 4, 2: 1 if m > 64 else 2, 3: 1}[row_groups]
    tile = Tile(tile_m, row_groups, k_groups, split_k, 0, blocks, 0)
    while tile.k_groups > 1 and (rounds // split_k < 2 * tile.k_groups or not tile.fits_registers(columns)):
        tile = dataclasses.replace(tile, k_groups=tile.k_groups // 2)
    while tile.row_groups > 1 and not tile.fits_registers(columns):
        tile = dataclasses.replace(tile, row_groups=tile.row_groups - 1)
    tile = _ahead_if_it_fits(tile, columns) if blocks > 1 or columns > 1 else tile
    half = _with_stages(tile, columns, smem // 2)
    return half if m <= 32 and half.stages >= 2 * tile.k_groups else _with_stages(tile, columns, smem)


def candidates(m: int, n: int, k: int, columns: int, sms: int, smem: int) -> list[Tile]:
    """Tiles worth measuring: those that fit, and that fill the chip without slivers."""
    found: list[Tile] = []
    fitting = min(128, max(8, 1 << (m - 1).bit_length()))
    shapes = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1))
    sizes = sorted({fitting, min(fitting, 64)})
    for tile_m, (row_groups, k_groups), split_k, blocks in itertools.product(sizes, shapes, (1, 2, 4), (1, 2, 4)):
        programs = -(-n // (ROWS * row_groups)) * -(-m // tile_m) * split_k
        slivers = split_k > 1 and (k // (BLOCK * blocks * split_k) < 2 * k_groups or programs > 4 * sms)
        tile = Tile(tile_m, row_groups, k_groups, split_k, 0, blocks, 0)
        if slivers or blocks * tile_m > 256 or not tile.fits_registers(columns):
            continue
        ahead_or_not, clusters = range(1 + _ahead_if_it_fits(tile, columns).ahead), _CLUSTERS.get(tile_m, (1,))
        for ahead, cluster, room in itertools.product(ahead_or_not, clusters, (smem // 2, smem)):
            one = _with_stages(dataclasses.replace(tile, ahead=ahead, cluster=cluster), columns, room)
            if smem_of(one, columns) <= smem and one.stages > one.k_groups and one not in found:
                found.append(one)
    return found
