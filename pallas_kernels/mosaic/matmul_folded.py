"""y = residual + activation(x @ w + bias) on Hopper, scales folded into the weight's values, in float16.

    y[m, n] = sum_k x[m, k] * value(code[n, k]) * scale[n, k // g]

Operands are those of `matmul_packed`, or codes of 8 bits `[N, K]`, int8 or e4m3. There each group's sum is multiplied
by its scale: a multiplication and an addition for each element of the result and block of K, beside tensor cores that
have to wait for them. Here the values are multiplied, 64 of a thread's in a block whatever the rows of x, and sums stay
in the tensor cores from the first block to the last. In bfloat16 that would round values to 8 bits and cost 1.4 times
the error of rounding the result; float16's 11 make it 1.01. Its range is another, so powers of two are taken out:

    x       of each row: its largest number lies in [2^14, 2^15), before the kernel (`fit_rows`)
    scales  of each row of the weight: the largest in [2^10, 2^11), by the producer, which reads them all first

and put back into the sums. What is 2^28 times smaller than the largest of its row loses bits. int4 about its middle
code, and int8, have the largest scale in [2^-10, 2^-9) instead, for a code is a subnormal number where it lies
(`pallas_kernels.pairs.scaled_code`): values are rounded to 2^-24 at least, so that a group whose scale is 2^9 times
smaller than its row's largest is as exact as in bfloat16. e4m3's bits are a float16 where they lie, too.

Work: one program a multiprocessor walks over tiles of `rows` of the weight and `tile_m` of x (`walk`). Its warpgroups:

    producer    TMA: x [tile_m, 128], words [rows, 128] of a block ──▶ ring of stages in shared memory, across tiles;
                its lanes: scales ──times a power of two of the row──▶ pairs of float16; those powers; zero points
    consumers   words ──LDS.128──▶ registers ──`operand`──▶ values [64, 64] ──wgmma, x from shared memory──▶ sums
                at a tile's end: * powers of two, + bias ──▶ y in shared memory, turned ──TMA──▶ y

A consumer decodes one half of a block while the other half is multiplied, and the next block while another consumer's
is: each has only to have its products queued before the others' are done.

Numerics: scales and zero-centred values are rounded to float16, then their product is; sums float32; one rounding of
the result.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.mosaic import byte_operand, columns, operand
from pallas_kernels.mosaic.fit_rows import fit_rows
from pallas_kernels.mosaic.folded_plan import BYTES, HALF, Plan, Tile, candidates, piece_of, tile_for, with_room
from pallas_kernels.mosaic.folded_producer import fill
from pallas_kernels.mosaic.launch import launch, slot_of
from pallas_kernels.mosaic.lines import in_lines, tiled, views
from pallas_kernels.mosaic.operand import BLOCK, OF_ROWS, ROWS, SINGLE, VALUES, WORDS, WORDS_A_BLOCK
from pallas_kernels.mosaic.plan import entries_of
from pallas_kernels.mosaic.sums import ready
from pallas_kernels.mosaic.walk import Roles, barriers, walk

_OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if facts["weight"] in BYTES:
        if k % 16 or facts["group"] < min(k, HALF) or "zero_point" in facts["features"]:
            return f"of bytes it takes whole 16 of K, groups of {HALF}, not {k} and {facts['group']}; no zero points"
    return why_not(k, n, **facts)


def configs(
    m: int, k: int, n: int, *, weight: str, group: int, smem: int, symmetric: bool, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring."""
    entries = entries_of(group, weight not in BYTES and not symmetric)
    return [dataclasses.asdict(tile) for tile in candidates(m, k, weight, entries, smem)]


def _place(plan: Plan, warpgroup: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A consumer's place along the weight's rows and along K."""
    row_groups = jnp.int32(plan.tile.row_groups)
    return jax.lax.rem(warpgroup, row_groups), jax.lax.div(warpgroup, row_groups)


def _sums(plan: Plan, warpgroup: jax.Array, first: jax.Array, s: Any) -> jax.Array:
    """The products of a consumer's stages of a tile, whose first is number `first`, `[64, tile_m]`."""
    tile, (of_rows, of_k) = plan.tile, _place(plan, warpgroup)
    _, x_tiles = views(s["x"], plan.interpret)
    first, count = first + of_k, jax.lax.div(plan.rounds - of_k + (tile.k_groups - 1), jnp.int32(tile.k_groups))
    rows, of_stage = pl.ds(of_rows * ROWS, ROWS), tile.blocks * plan.groups

    def read(slot: jax.Array, block: int) -> list[jax.Array]:
        """Of a block of a stage: its words, and the pairs of its groups by which they are decoded."""
        found = []
        for first in range(block * plan.words, (block + 1) * plan.words, WORDS_A_BLOCK):
            words = s["w"].at[slot, rows, pl.ds(first, WORDS_A_BLOCK)]
            found.append(plgpu.load(words, layout=WORDS, optimized=False))
        for which, group in itertools.product(range(1 + plan.zeros), range(plan.groups)):
            pairs = s["entries"].at[slot, which * of_stage + block * plan.groups + group, rows]
            found.append(plgpu.load(pairs, layout=OF_ROWS, optimized=False))
        return found

    def kept(given: Sequence[jax.Array]) -> list[jax.Array]:
        """What was read, where it was read."""
        count = plan.words // WORDS_A_BLOCK
        return [ready(a, WORDS if i < count else OF_ROWS) for i, a in enumerate(given)]

    def values(given: Sequence[jax.Array], half: int) -> jax.Array:
        groups = slice(half * plan.groups // 2, -(-(half + 1) * plan.groups // 2))
        if plan.weight in BYTES:
            factors = given[2:][groups]
            return byte_operand.values(given[half], factors[0], weight=plan.weight, interpret=plan.interpret)
        words, *pairs = given
        return operand.values(
            words,
            weight=plan.weight,
            dtype="float16",
            piece=half,
            pieces=2,
            zero=pairs[plan.groups :][groups],
            factors=pairs[: plan.groups][groups],
            interpret=plan.interpret,
            raised=bool(plan.raised),
        )

    def next_to(slot: jax.Array, i: jax.Array) -> jax.Array:
        """The slot of this consumer's next stage, once that is full."""
        after = slot + tile.k_groups
        after = jnp.where(after >= tile.stages, after - tile.stages, after)

        @pl.when(i + 1 < count)
        def wait() -> None:
            plgpu.barrier_wait(s["full"].at[after])

        return after

    def multiply(sums: Any) -> jax.Array:
        def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            slot, before, *given = carry
            for block in range(tile.blocks):
                plgpu.wgmma(sums, values(given, 0), x_tiles.at[slot, 2 * block].T)
                plgpu.wgmma_wait(1)
                if block == 0:
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(s["empty"].at[before]))
                plgpu.wgmma(sums, values(given, 1), x_tiles.at[slot, 2 * block + 1].T)
                last = block + 1 == tile.blocks
                after = next_to(slot, i) if last else slot
                # Read while products are under way; behind the last stage it is another tile's, and nobody's.
                given = kept(read(after, 0 if last else block + 1))
                plgpu.wgmma_wait(1)
            return after, slot, *given

        _, last, *_ = jax.lax.fori_loop(0, count, step, (slot, slot, *read(slot, 0)))
        found = plgpu.wgmma_accumulator_load(sums)
        plgpu.barrier_arrive(s["empty"].at[last])
        return found

    def multiply_plainly() -> jax.Array:  # the interpreter takes wgmma's first operand from memory alone
        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, slot = carry
            for block, half in itertools.product(range(tile.blocks), range(2)):
                x = x_tiles[slot, 2 * block + half].astype(jnp.float32)
                total = total + values(read(slot, block), half).astype(jnp.float32) @ x.T
            plgpu.barrier_arrive(s["empty"].at[slot])
            return total, next_to(slot, i)

        return jax.lax.fori_loop(0, count, step, (jnp.zeros((ROWS, tile.tile_m), jnp.float32), slot))[0]

    slot = slot_of(first, tile.stages)
    plgpu.barrier_wait(s["full"].at[slot])
    back = plgpu.load(s["entries"].at[slot, plan.entries - 1, rows], layout=OF_ROWS, optimized=False)
    if plan.interpret:
        total = multiply_plainly()
    else:
        total = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, tile.tile_m), jnp.float32))
    back = jax.lax.bitcast_convert_type(back, jnp.float32)
    return total * jax.lax.broadcast_in_dim(back, total.shape, (0,))


def _store(plan: Plan, warpgroup: jax.Array, total: jax.Array, at: Any, s: Any) -> None:
    """The sums of consumers behind one another, for the first of them, who finishes and writes them."""
    if plan.tile.k_groups == 1:
        _finish(plan, warpgroup, total, at, s)
        return
    of_rows, of_k = _place(plan, warpgroup)

    @pl.when(of_k > 0)
    def hand_over() -> None:
        plgpu.barrier_wait(s["taken"].at[of_rows])
        s["sums"][of_k - 1, of_rows] = total
        plgpu.barrier_arrive(s["summed"].at[of_rows])

    @pl.when(of_k == 0)
    def take() -> None:
        plgpu.barrier_arrive(s["taken"].at[of_rows])  # what was there before
        plgpu.barrier_wait(s["summed"].at[of_rows])
        whole = total
        for other in range(plan.tile.k_groups - 1):
            whole = whole + plgpu.load(s["sums"].at[other, of_rows], layout=VALUES, optimized=False)
        _finish(plan, of_rows, whole, at, s)


def _finish(plan: Plan, of_rows: jax.Array, total: jax.Array, at: Any, s: Any) -> None:
    """Gives a tile's sums x's powers of two and the bias, and writes them, some rows of x at a time."""
    lines, tiles = views(s["out"], plan.interpret or s["y"].dtype == jnp.float32)
    first_x, first_w, height = at[0], at[1] + of_rows * ROWS, tiles.shape[1]
    if plan.bias:
        bias = plgpu.load(s["bias"].at[pl.ds(of_rows * ROWS, ROWS)], layout=OF_ROWS, optimized=False)
        bias = jax.lax.broadcast_in_dim(bias, (ROWS, height), (0,))
    for first in range(0, plan.tile.tile_m, height):
        part = total[:, first : first + height]
        if plan.x_scaled:
            scale = plgpu.load(s["x_scale"].at[pl.ds(first, height)], layout=_OF_COLUMNS, optimized=False)
            part = part * jax.lax.broadcast_in_dim(scale, (ROWS, height), (1,))
        if plan.bias:
            part = part + bias
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before, which was in the same place
        if tiles.dtype == jnp.float32:
            part = plgpu.layout_cast(part, SINGLE)
        tiles.at[of_rows].T[...] = part.astype(tiles.dtype)
        plgpu.commit_smem()
        to = s["y"].at[pl.ds(first_x + first, height), pl.ds(first_w, ROWS)]
        plgpu.copy_smem_to_gmem(lines.at[of_rows], to)


def _scratch(plan: Plan, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    tile, smem = plan.tile, plgpu.SMEM
    piece = (tile.row_groups, piece_of(out_dtype.itemsize), ROWS)
    found = dict(
        x=in_lines((tile.stages, 2 * tile.blocks, tile.tile_m, HALF), jnp.float16, plan.interpret),
        w=smem((tile.stages, tile.rows, tile.blocks * plan.words), jnp.uint32),
        out=in_lines(piece, out_dtype, plan.interpret)
        if out_dtype.itemsize == 2
        else smem(piece, out_dtype, transforms=tiled(out_dtype)),
        entries=smem((tile.stages, plan.entries, tile.column_rows), jnp.uint32),
    ) | barriers(tile, arrivals=2 + 2 * tile.blocks, consumers=tile.consumers, readers=tile.row_groups)
    if tile.k_groups > 1:
        found["sums"] = smem((tile.k_groups - 1, tile.row_groups, ROWS, tile.tile_m), jnp.float32)
        found["summed"] = plgpu.Barrier(num_arrivals=tile.k_groups - 1, num_barriers=tile.row_groups)
        found["taken"] = plgpu.Barrier(num_barriers=tile.row_groups)
    if plan.x_scaled:
        found["x_scale"] = smem((tile.wide,), jnp.float32)
    if plan.bias:
        found["bias"] = smem((tile.column_rows,), jnp.float32)
    return found


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    group: int,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    sms: int = 132,
    smem: int = 227 * 1024,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring; arguments are those of `matmul_packed.matmul`.

    Args:
      config: fields of `Tile`; empty takes `tile_for` the shape and the chip.
      (others: see there)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    (m, k), n = x.shape, packed.shape[0]
    blocks = -(-k // BLOCK)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    entries = entries_of(group, zero_point is not None)
    tile = Tile(**config) if config else tile_for(m, n, k, weight, entries, sms=sms, smem=smem)
    whole = all(v is None for v in (global_scale, activation, residual))
    stored = jnp.dtype(out_dtype if whole else jnp.float32)
    group = blocks * BLOCK if scale.shape[1] == 1 else group
    if weight in BYTES:
        packed = jax.lax.bitcast_convert_type(packed.reshape(n, -1, 4), jnp.uint32)
    operands = dict(w=packed.reshape(n, -1), scale=columns.as_words(scale))
    operands["x"] = jnp.pad(x, ((0, 0), (0, -k % (HALF if weight in BYTES else 8))))  # rows of whole 16 bytes
    if x.dtype != jnp.float16 or weight in BYTES:
        fitted = fit_rows(operands["x"], bytes_order=weight in BYTES, interpret=interpret)
        operands["x"], operands["x_scale"] = fitted
    if zero_point is not None:
        operands["zero"] = columns.as_words(zero_point)
    if whole and bias is not None:
        operands["bias"] = bias[:, None]
    zeros, x_scaled, biased = (name in operands for name in ("zero", "x_scale", "bias"))
    tile = with_room(tile, weight, entries, biased, smem)
    plan = Plan(
        m, n, blocks, weight, group, scale.dtype.name, zeros, x_scaled, biased, tile, sms, interpret
    )  # fmt: skip
    if plan.rounds < tile.k_groups or tile.stages < 2 * tile.k_groups or tile.stages % tile.k_groups:
        raise ValueError(
            f"{tile}: wants a stage of K={k} for each of k_groups={tile.k_groups}, of {plan.rounds}, and in the ring "
            f"a multiple of that, twice as many at least, not {tile.stages}"
        )
    # Rows of the copy engine's arrays are whole 16 bytes. One of 64 in float32 is two of 128 bytes: whole tiles.
    unit_m, unit_n = (1, 8) if stored.itemsize == 2 else (8, 32)
    of_tile = dict(x_scale=(0, tile.wide), bias=(1, tile.column_rows))
    roles = Roles(fill, {name: of_tile[name] for name in of_tile if name in operands}, _sums, _store)
    y = launch(
        functools.partial(walk, plan, roles, tuple(operands)),
        jax.ShapeDtypeStruct((m + -m % unit_m, n + -n % unit_n), stored),
        name=f"qjax_{weight}_hopper_folded",
        programs=plan.walk.programs,
        warpgroups=tile.consumers + 1,
        scratch=_scratch(plan, stored),
        cluster=tile.cluster,
        interpret=interpret,
    )(*operands.values())[:m, :n]
    if whole:
        return y
    return finish(y, out_dtype, global_scale=global_scale, bias=bias, activation=activation, residual=residual)
