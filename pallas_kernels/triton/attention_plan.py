"""What is static of attention over a cache: its shapes, and how programs divide it (`decode_attention.py`)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

TOP = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of a coded cache
_COLUMNS = 8  # of the tensor cores' result, at least
_BLOCK_BYTES = 16384  # of keys in flight a stage, and of values
_GROUP_OF_LANES = 4  # query heads of a key-value head that lanes multiply codes for
_MANY = 8  # programs a multiprocessor that are better small
_SHORTEST_SHARE = 128  # slots that are worth a program


@dataclasses.dataclass(frozen=True)
class Tile:
    """A configuration: slots of a block, programs that share a row's slots, warps, blocks in flight.

    `rows` slots of a block lie side by side over lanes that multiply, 16 bytes a lane; 0 takes the tensor cores.
    """

    block: int
    shares: int
    warps: int
    stages: int
    rows: int = 0


def _lanes(kind: str, group: int, programs: int) -> tuple[int, int, int]:
    """Warps, slots that a lane has of a block, blocks in flight: the best of some dozen on an H200."""
    if kind != "int8":
        return (4 if kind in TOP else 8), 4, 1
    if group > 1:
        return 2, 4, 2
    return (2, 8, 1) if programs >= _MANY else (4, 4, 1)


def tile_for(
    heads: int, cache: tuple[int, ...], dtype: Any, cache_dtype: Any, sms: int, smem: int, *, lanes: bool = True
) -> Tile:
    """The tile for a cache `[batch, kv_heads, capacity, head_dim]`: programs for all multiprocessors, no slivers.

    Args:
      heads: of queries.
      dtype, cache_dtype: of the token and of the cache.
      sms: multiprocessors of the chip; smem: bytes of shared memory that a program may have.
      lanes: False leaves products to the tensor cores whatever the shape.
    """
    batch, kv_heads, capacity, head_dim = cache
    shares, wide, group = 1, pl.next_power_of_2(head_dim), heads // kv_heads
    while 4 * shares * batch * kv_heads < 3 * sms and capacity // (2 * shares) >= _SHORTEST_SHARE:
        shares *= 2
    # Where a program has a multiprocessor to itself its own loads must cover the latency, else its neighbours' do:
    # Triton loads ahead what tensor cores take.
    alone, kind = shares * batch * kv_heads <= sms, jnp.dtype(cache_dtype).name
    few = (group <= _GROUP_OF_LANES and not alone) if kind in TOP else group == 1 and (shares > 1 or not alone)
    if lanes and few:
        warps, high, stages = _lanes(kind, group, batch * kv_heads // sms)
        rows = warps * 32 * 16 // (wide * jnp.dtype(cache_dtype).itemsize)
        return Tile(high * rows, shares, warps, stages, rows)
    block = min(128, max(16, _BLOCK_BYTES // (wide * jnp.dtype(dtype).itemsize)))
    return Tile(block, shares, 4, (4 if smem >= 128 * 1024 else 3) if alone else 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call."""

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    scale: float
    softcap: float | None
    window: int | None
    coded: bool  # whether the cache holds codes and scales
    tile: Tile
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.kv_heads

    @property
    def parts(self) -> int:
        """Into how many the query heads of a key-value head go: lanes take one at a time."""
        return self.group if self.tile.rows else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of a part's numbers in registers, padded: a column for each query head."""
        columns = 1 if self.tile.rows else max(_COLUMNS, pl.next_power_of_2(self.group))
        return pl.next_power_of_2(self.head_dim), columns
