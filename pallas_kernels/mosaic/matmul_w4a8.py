"""y = residual + activation(x @ w + bias) on Hopper, weights of 4 bits, x of 8, for many rows of x.

    y[m, n] = x_scale[m] * sum_k x[m, k] * (code(n, k) - 8) * scale[n, k // group]

Operands
    x          int8 [M, K]; x_scale float32 [M, 1]
    packed     uint32 [N, B, 16], the packed order, B = ceil(K / 128)
    scale      [N, ceil(K / group)] or [1, 1]: float16, bfloat16, float32, float8_e8m0fnu or float8_e4m3fn
    bias       [N]; residual [M, N]

Work: one program a multiprocessor walks over tiles of 128 rows of the weight and `tile_m` of x, in bands of 16 tiles
along M. Its warpgroups:

    producer    TMA: x [tile_m, 128], words [128, 16] of a block of K ──▶ ring of stages in shared memory, across tiles;
                its lanes: scales of a block, those of x and the bias of a tile ──▶ float32 in shared memory
    2 consumers words ──3 operations on four codes──▶ int8 in registers ──wgmma, x from shared memory──▶ sums
                sums ──scale──▶ total [64, tile_m] ... ──x_scale, bias──▶ y in shared memory, turned ──TMA──▶ y

The product is `y.T`: the weight is the operand that stays in registers. Consumers take turns: one's products begin when
the other's are done but for the last ones, so that tensor cores multiply for one while the other scales and decodes.
Products of both under way at once would end at once, and leave the tensor cores idle while both scale.

Scales without conversions of integers. The sums P run on from block to block, P(b) of blocks 0 .. b, and

    sum over b of scale(b) * (P(b) - P(b - 1))  =  sum over b of P(b) * (scale(b) - scale(b + 1))

with a scale of 0 beyond the last, so that what the producer brings are differences of scales, and nothing is set to
zero between groups. The int32 accumulators begin at the bits of the float 1.5 * 2^23, where one more is one more in
float32, too: read as float32 they are Z + P, Z = 1.5 * 2^23, exactly, while |P| <= 2^22. That holds for 32 blocks, 4096
columns; then they begin anew. Nor is Z taken off an element: the total begins at -Z * scale(0), and since differences
of scales add up, it is at -Z * scale(b + 1) + y after block b and at y after the last.

Numerics: sums of codes are exact. Each block rounds the total where it has the size of Z * scale(b + 1): about a third
of that scale, rms, whatever the others are. Of y that is 1 / (34 rms(x codes) rms(w codes)): 2e-4 of its norm for 32
and 4.6, a fortieth of what x lost when it became int8, and 1.6e-3 is what bfloat16 rounds off y. Only for results in
bfloat16, therefore, and not for scales in float32, whose differences are rounded as well: for others Z is subtracted
from each sum, exactly, and the sum over blocks is rounded to float32. One rounding to `out_dtype`, of the result.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.mosaic import accumulate, columns, int8_operand
from pallas_kernels.mosaic.launch import launch, shared_in, slot_of
from pallas_kernels.mosaic.lines import in_lines, tiled, views
from pallas_kernels.mosaic.operand import BLOCK, OF_ROWS, ROWS, SINGLE, VALUES, WORDS, WORDS_A_BLOCK
from pallas_kernels.mosaic.sums import finished
from pallas_kernels.mosaic.w4a8_plan import EXACT, PIECE, TILE_N, Plan, Tile, candidates, tile_for
from pallas_kernels.mosaic.walk import CONSUMERS, SLOTS, Roles, barriers, walk

ZERO = np.float32(1.5 * 2**23)  # the float whose neighbours are one apart, 2^22 of them on either side
ZERO_BITS = np.int32(0x4B400000)
_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def unsupported(
    m: int, k: int, n: int, *, symmetric: bool, group: int, block_n: int, transposed: bool, **_: Any
) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if not symmetric:
        return "it knows no zero points"
    if block_n not in (1, n) or (block_n == n != 1 and group < k):
        return f"its scales belong to one row or to all, not to {block_n} rows"
    if group < k and group % BLOCK:
        return f"groups of {group}: it knows multiples of {BLOCK}"
    return None


def configs(m: int, k: int, n: int, *, smem: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring."""
    return [dataclasses.asdict(tile) for tile in candidates(m, smem)]


def _starts_anew(plan: Plan, block: jax.Array) -> jax.Array:
    """Whether sums begin anew behind a block."""
    return (jax.lax.rem(block, jnp.int32(EXACT)) == EXACT - 1) | (block == plan.steps - 1)


def _fill(plan: Plan, first: jax.Array, first_x: jax.Array, first_w: jax.Array, refs: Any, s: Any) -> None:
    """A tile's stages, from number `first` on."""
    tile = plan.tile
    x_lines, _ = views(s["x"], plan.interpret)

    def scales(block: Any) -> jax.Array:
        column = jnp.minimum(jax.lax.div(block, jnp.int32(plan.group // BLOCK)), refs["scale"].shape[1] - 1)
        return columns.read(refs["scale"], first_w, column, TILE_N, plan.interpret)

    def one(block: jax.Array, ahead: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot = slot_of(first + block, tile.stages)
        plgpu.barrier_wait(s["empty"].at[slot])
        plgpu.commit_smem()  # what lanes have read there, the copy engine may overwrite
        full = s["full"].at[slot]
        words = refs["w"].at[pl.ds(first_w, TILE_N), pl.ds(block * WORDS_A_BLOCK, WORDS_A_BLOCK)]
        plgpu.copy_gmem_to_smem(words, s["w"].at[slot], full)
        x = refs["x"].at[pl.ds(first_x, tile.tile_m), pl.ds(block * BLOCK, BLOCK)]
        plgpu.copy_gmem_to_smem(x, x_lines.at[slot], full, collective_axes=shared_in(tile.cluster))
        this, following = (columns.value(raw, plan.scale) for raw in ahead)  # only now: they have come by then
        s["scale"][slot, 0] = this - jnp.where(_starts_anew(plan, block), jnp.float32(0), following)
        s["scale"][slot, 1] = this
        plgpu.barrier_arrive(full)
        return ahead[1], scales(block + 2)

    jax.lax.fori_loop(0, plan.steps, one, (scales(jnp.int32(0)), scales(jnp.int32(1))))


def _multiply(plan: Plan, warpgroup: jax.Array, sums: jax.Array, values: jax.Array, x: Any, s: Any) -> jax.Array:
    """`sums + values @ x.T`, in turn: the other's begins when only the last `early` columns are left."""
    plgpu.barrier_wait(s["turn"].at[warpgroup])
    if not plan.interpret:  # which takes wgmma's first operand from memory alone
        sums = int8_operand.begin(sums, values, x, tiled(jnp.int8), plan.tile.early)
        plgpu.wgmma_wait(1)
    plgpu.barrier_arrive(s["turn"].at[1 - warpgroup])
    if plan.interpret:
        return sums + values.astype(jnp.int32) @ x[...].astype(jnp.int32).T
    return finished(sums, 0)


def _add(plan: Plan, warpgroup: jax.Array, first: jax.Array, count: Any, total: jax.Array, s: Any) -> jax.Array:
    """`total` and the scaled products of `count` stages from number `first` on, at most `EXACT`, `[64, tile_m]`."""
    _, x_tiles = views(s["x"], plan.interpret)
    rows = pl.ds(warpgroup * ROWS, ROWS)

    def scale_of(slot: jax.Array, which: int) -> jax.Array:
        return plgpu.load(s["scale"].at[slot, which, rows], layout=OF_ROWS, optimized=False)

    def filled(entry: Any) -> jax.Array:
        return plgpu.layout_cast(jnp.full((ROWS, plan.tile.tile_m), entry), VALUES)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, sums, slot = carry
        scale = scale_of(slot, 0)
        values = int8_operand.values(plgpu.load(s["w"].at[slot, rows], layout=WORDS), plan.interpret)
        sums = _multiply(plan, warpgroup, sums, values, x_tiles.at[slot], s)
        plgpu.barrier_arrive(s["empty"].at[slot])
        found = jax.lax.bitcast_convert_type(sums, jnp.float32)
        total = accumulate.add_scaled(total, found if plan.as_bits else found - ZERO, scale, plan.interpret)
        following = jnp.where(slot == plan.tile.stages - 1, 0, slot + 1)

        @pl.when(i + 1 < count)
        def wait() -> None:
            plgpu.barrier_wait(s["full"].at[following])

        return total, sums, following

    slot = slot_of(first, plan.tile.stages)
    plgpu.barrier_wait(s["full"].at[slot])
    if plan.as_bits:
        total = accumulate.add_scaled(total, filled(-ZERO), scale_of(slot, 1), plan.interpret)
    return jax.lax.fori_loop(0, count, step, (total, filled(ZERO_BITS), slot))[0]


def _total(plan: Plan, warpgroup: jax.Array, first: jax.Array, s: Any) -> jax.Array:
    """The scaled products of a tile's stages, `[64, tile_m]`."""

    def part(i: jax.Array, total: jax.Array) -> jax.Array:
        count = jnp.minimum(plan.steps - i * EXACT, EXACT)
        return _add(plan, warpgroup, first + i * EXACT, count, total, s)

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, plan.tile.tile_m), jnp.float32), VALUES)
    return jax.lax.fori_loop(0, -(-plan.steps // EXACT), part, zeros)


def _store(plan: Plan, warpgroup: jax.Array, total: jax.Array, at: Any, s: Any) -> None:
    """Multiplies a tile's sums by the scales of x, adds the bias and writes them, `PIECE` rows of x at a time."""
    lines, tiles = views(s["out"], plan.interpret or s["y"].dtype == jnp.float32)
    first_x, first_w = at
    if plan.bias:
        bias = plgpu.load(s["bias"].at[pl.ds(warpgroup * ROWS, ROWS)], layout=OF_ROWS, optimized=False)
        bias = jax.lax.broadcast_in_dim(bias, (ROWS, PIECE), (0,))
    for i, first in enumerate(range(0, plan.tile.tile_m, PIECE)):
        scale = plgpu.load(s["x_scale"].at[pl.ds(first, PIECE)], layout=_OF_COLUMNS, optimized=False)
        part = total[:, first : first + PIECE] * jax.lax.broadcast_in_dim(scale, (ROWS, PIECE), (1,))
        if plan.bias:
            part = part + bias
        plgpu.wait_smem_to_gmem(min(i, SLOTS - 1), wait_read_only=True)  # the first: all of the tile before
        if tiles.dtype == jnp.float32:
            part = plgpu.layout_cast(part, SINGLE)
        tiles.at[warpgroup, i % SLOTS].T[...] = part.astype(tiles.dtype)
        plgpu.commit_smem()
        rows, of_w = pl.ds(first_x + first, PIECE), pl.ds(first_w + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(lines.at[warpgroup, i % SLOTS], s["y"].at[rows, of_w])


def _scratch(plan: Plan, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    tile, smem, piece = plan.tile, plgpu.SMEM, (CONSUMERS, SLOTS, PIECE, ROWS)
    found = dict(
        x=in_lines((tile.stages, tile.tile_m, BLOCK), jnp.int8, plan.interpret),
        w=smem((tile.stages, TILE_N, WORDS_A_BLOCK), jnp.uint32),
        out=in_lines(piece, out_dtype, plan.interpret)
        if out_dtype.itemsize == 2
        else smem(piece, out_dtype, transforms=tiled(out_dtype)),
        scale=smem((tile.stages, 2, TILE_N), jnp.float32),
        x_scale=smem((tile.wide,), jnp.float32),
    ) | barriers(tile, arrivals=3, turns=True)
    if plan.bias:
        found["bias"] = smem((TILE_N,), jnp.float32)
    return found


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    group: int,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: dict[str, int] | None = None,
    sms: int = 132,
    smem: int = 227 * 1024,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      group: columns of K that share a scale, a multiple of 128 where `scale` has more than one column.
      activation: elementwise, on float32.
      out_dtype: of the result.
      config: fields of `Tile`; empty takes `tile_for` the shape and the chip: `sms` multiprocessors, `smem` bytes of
        shared memory that a program may have.
      interpret: run in JAX's interpreter of such kernels, on any machine; it raises where they race.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`.
    """
    m, (n, blocks) = x.shape[0], packed.shape[:2]
    tile = Tile(**config) if config else tile_for(m, n, sms=sms, smem=smem)
    whole = activation is None and residual is None
    stored = jnp.dtype(out_dtype if whole else jnp.float32)
    group = blocks * BLOCK if scale.shape[1] == 1 else group
    as_bits = jnp.dtype(out_dtype) == jnp.bfloat16 and scale.dtype != jnp.float32
    plan = Plan(m, n, blocks, group, scale.dtype.name, whole and bias is not None, as_bits, tile, sms, interpret)
    operands = dict(
        x=int8_operand.in_order(x), w=packed.reshape(n, -1), x_scale=x_scale, scale=columns.as_loaded(scale)
    )
    if plan.bias:
        assert bias is not None
        operands["bias"] = bias[:, None]
    # Rows of the copy engine's arrays are whole 16 bytes. One of `PIECE` in float32 is two of 128 bytes: whole tiles.
    unit_m, unit_n = (1, 8) if stored.itemsize == 2 else (8, 32)
    entries = dict(x_scale=(0, tile.wide)) | (dict(bias=(1, TILE_N)) if plan.bias else {})
    roles = Roles(_fill, entries, _total, _store, turns=True)
    y = launch(
        functools.partial(walk, plan, roles, tuple(operands)),
        jax.ShapeDtypeStruct((m + -m % unit_m, n + -n % unit_n), stored),
        name="qjax_w4a8_hopper",
        programs=plan.walk.programs,
        warpgroups=CONSUMERS + 1,
        scratch=_scratch(plan, stored),
        cluster=tile.cluster,
        interpret=interpret,
    )(*operands.values())[:m, :n]
    if whole:
        return y
    return finish(y, out_dtype, global_scale=None, bias=bias, activation=activation, residual=residual)
