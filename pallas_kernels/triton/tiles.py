"""Tile sizes: what one program computes, and a first choice of it from the shape and the chip, before any tuning."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel's configuration.

    Attributes:
      tile_m: rows of x a program computes, 16 or more: the tensor cores' shortest side.
      tile_n: rows of the weight a program computes.
      split_k: programs that share one output tile, each with a part of K.
      warps: of a program. Fewer than four means `mma` instead of `wgmma` on Hopper: right while memory is the limit.
      stages: tiles in flight from memory to shared memory.
    """

    tile_m: int
    tile_n: int
    split_k: int
    warps: int
    stages: int


# Sums of 64 x 128 and more are too many registers but for Hopper's tensor cores, which read x from shared memory.
_SMALLER = (None, 64, 64, 4, 3)
# (most rows of x, tile_m, tile_n, warps, stages).  measured: H200, 22016x4096; the last row is for want of registers
_SHAPES = (
    (16, 16, 64, 2, 3),
    (32, 32, 128, 4, 3),
    _SMALLER,
)
_PROGRAMS_A_MULTIPROCESSOR = 4  # enough loads in flight to cover memory's latency
_SHORTEST_SHARE = 4  # blocks of 128 along K that are worth a program


def smem_of(tile: Tile, bits: int) -> int:
    """Shared memory of a program, in bytes: the blocks of 128 columns in flight, of codes and of 16-bit x."""
    return tile.stages * (tile.tile_n * 16 * bits + tile.tile_m * 256)


def _fitting(tile: Tile, bits: int, smem: int) -> Tile:
    """The tile with as many stages as fit, two at least."""
    tiles = [dataclasses.replace(tile, stages=stages) for stages in range(tile.stages, 1, -1)]
    return next((tile for tile in tiles if smem_of(tile, bits) <= smem), tiles[-1])


def tile_for(m: int, n: int, blocks: int, sms: int, smem: int) -> Tile:
    """The tile for weights of eight bits.

    Args:
      m: rows of x; n: of the weight.
      blocks: of 128 columns along K.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have.
    """
    _, tile_m, tile_n, warps, stages = next(row for row in _SHAPES if row[0] is None or m <= row[0])
    programs = -(-n // tile_n) * -(-m // tile_m)
    split_k = 1
    while split_k * programs < 7 * _PROGRAMS_A_MULTIPROCESSOR * sms // 8 and blocks // (2 * split_k) >= _SHORTEST_SHARE:
        split_k *= 2
    return _fitting(Tile(tile_m, tile_n, split_k, warps, stages), 8, smem)


# For packed weights: (most rows of x, tile_m, tile_n, warps, stages).  measured: H200, int4 g128
_PACKED_SHAPES = (
    (8, 8, 64, 4, 3),
    (16, 16, 64, 4, 3),
    (32, 32, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (None, 128, 128, 8, 3),
)


def packed_tile(m: int, n: int, blocks: int, bits: int, tallest: int, sms: int, smem: int, cc: int) -> Tile:
    """The tile for packed weights of `bits`, at most `tallest` rows of x in it; the rest as in `tile_for`."""
    shapes = _PACKED_SHAPES if cc == 90 else (*_PACKED_SHAPES[:-2], _SMALLER)
    _, tile_m, tile_n, warps, stages = next(row for row in shapes if row[0] is None or m <= row[0])
    tile_m = min(tile_m, tallest)
    programs, split_k = -(-n // tile_n) * -(-m // tile_m), 1
    while split_k < 8 and split_k * programs < 3 * sms and blocks // (2 * split_k) >= _SHORTEST_SHARE:
        split_k *= 2
    return _fitting(Tile(tile_m, tile_n, split_k, warps, stages), bits, smem)
