"""What a product of one stage is made of: values in registers, the scales of their sums, whole tiles of x."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import operand
from pallas_kernels.mosaic.operand import OF_ROWS, ROWS, WORDS
from pallas_kernels.mosaic.plan import Plan


def piece_of(
    plan: Plan, s: Any, slot: jax.Array, row_group: jax.Array, index: int, dtype: str
) -> tuple[jax.Array, jax.Array | None]:
    """Of product `index` of a stage: the values `[64, width]`, the scales `[64]` of its sums, None where values
    have them."""
    block, piece = divmod(index, plan.pieces)
    rows = pl.ds(row_group * ROWS, ROWS)

    def entries(name: str, first: int, count: int) -> list[jax.Array]:
        refs = [s[name].at[slot, i, rows] for i in range(first, first + count)]
        return [plgpu.load(ref, layout=OF_ROWS, optimized=False) for ref in refs]

    values = operand.values(
        plgpu.load(s["w"].at[slot, block, rows], layout=WORDS),
        weight=plan.weight,
        dtype=dtype,
        piece=piece,
        pieces=plan.pieces,
        zero=entries("zero", index, 1) if plan.zeros else [],
        factors=entries("scale", block * plan.groups, plan.groups) if plan.scales_values else [],
        interpret=plan.interpret,
    )
    return values, None if plan.scales_values else entries("scale", index, 1)[0]


def whole_tiles(x: jax.Array) -> jax.Array:
    """x, padded with zeros where it is not made of tiles of 8 x 64, as which the copy engine brings it."""
    (m, k), few = x.shape, x.shape[0] <= 8  # one tile may reach beyond
    return jnp.pad(x, ((0, 0 if few else -m % 8), (0, -k % 64)))
