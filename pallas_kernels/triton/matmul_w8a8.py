"""y = residual + activation(x @ w + bias) where both operands are of eight bits: int8 times int8, e4m3 times e4m3.

    y[m, n] = sum_k x[m, k] * x_scale[m, k // 128] * (codes[n, k] - zero_point[n, k // g]) * scale[n // block_n, k // g]
              (+ sum_c outlier_x[m, c] * outlier_w[n, c])

Operands
    x          int8 or float8_e4m3fn [M, K]; x_scale float32 [M, C], C = 1 or ceil(K / 128)
    codes      of x's dtype [N, K], natural order
    scale      float16, bfloat16 or float32 [ceil(N / block_n), ceil(K / g)]: one a row, a group or a block
    zero_point int8 like scale, with int8 codes; bias [N]; residual [M, N]
    outlier_x  bfloat16 or float16 [M, C] with outlier_w [N, C]: a few columns in 16 bits, as in LLM.int8

Work: programs in bands of 16 tiles along M, so that those that run together share rows of both operands in the L2:

        n tiles ->
    m   0 16 32 ...      a program: steps of 128 columns through shared memory (`stages` in flight) into the tensor
    |   1 17 33          cores, x first; below 64 rows of x the weight comes first, since the first operand of a `wgmma`
    v   :                has 64 rows. With few programs K is shared out (`split_k`) and XLA adds the shares

Scales, bias, activation and residual meet the sum in registers: neither int32 sums nor unscaled ones reach memory.
Scales along K are loaded one step ahead of their use.

Numerics: one scale a row and int8 sum exactly in int32; one scale a row and e4m3 sum 512 products in the tensor cores,
which on Hopper keep 14 bits there, and those sums in float32. With scales along K each step of 128 is scaled and added
in float32.

Measured on an H200, the quantization of x included, against bfloat16: int8 at M = 2048 takes 0.54 to 0.66 of the time,
1.0 to 1.2 PFLOP/s. Triton waits for each step's integer `wgmma`; two programs a multiprocessor hide each other's waits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.result import result
from pallas_kernels.triton import edges
from pallas_kernels.triton.fp8_dot import fp8_dot
from pallas_kernels.triton.tiles import Tile

STEP = 128
PROMOTED = 4  # steps of e4m3 whose sum stays in the tensor cores before it joins the total
BAND = 16  # tiles of x whose programs run next to each other
MOST_EXACT_K = 2**31 // (128 * 256) - 1  # products of int8 codes, less a zero point, whose sum int32 holds

Activation = Callable[[jax.Array], jax.Array]


def unsupported(
    m: int, k: int, n: int, *, weight: str, x_format: str | None, group: int, transposed: bool, cc: int,
    scale_dtype: str, features: frozenset[str] = frozenset(), **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if weight not in ("int8", "e4m3") or x_format != weight:
        return f"it takes weight and x both in int8 or both in e4m3, not {weight} with {x_format or 'x as it is'}"
    if weight == "e4m3" and cc < 89:
        return f"tensor cores take FP8 from compute capability 8.9 on, this is {cc / 10:.1f}"
    if scale_dtype == "float8_e8m0fnu":
        return "it does not read e8m0 scales"
    if group < k and group % STEP:
        return f"groups of {group}: it knows multiples of {STEP}"
    if weight == "int8" and k > MOST_EXACT_K:
        return f"int32 sums of K={k} could overflow; at most {MOST_EXACT_K}"
    return None


# Candidates, and below the first choices.  measured: H200, 22016x4096, 8192x8192 and 4096x4096
_SMALL = ((32, 2, 8), (32, 4, 6), (64, 4, 4), (64, 4, 6), (128, 4, 4))  # tile_n, warps, stages: up to 64 rows of x
_LARGE = (  # tile_m, tile_n, warps, stages
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 256, 4, 3),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (128, 128, 8, 3),
)


def _fits(tile: Tile, smem: int, sums: int) -> bool:
    """Whether a tile's stages fit into the shared memory of a block, and `sums` float32 per element of the result into
    half of a thread's 255 registers."""
    stage = (tile.tile_m + tile.tile_n) * STEP
    return stage * tile.stages <= smem and sums * tile.tile_m * tile.tile_n <= 128 * 32 * tile.warps


def _sums(weight: str, k: int, group: int) -> int:
    """Sums a program holds for each element: one in int32, or a step's and the total."""
    return 1 if weight == "int8" and group >= k else 2


def configs(
    m: int, k: int, n: int, *, weight: str, group: int, smem: int, sms: int, **_: Any
) -> list[dict[str, int]]:  # fmt: skip
    """Configurations worth measuring: tiles not much larger than m, within shared memory and registers, K shared out
    where programs would be few."""
    steps, sums = -(-k // STEP), _sums(weight, k, group)
    rows = [row for row in _LARGE if m > 32 and row[0] <= max(64, pl.next_power_of_2(m))]
    rows += [(max(16, pl.next_power_of_2(m)), *row) for row in _SMALL if m <= 64]
    tiles = []
    for tile_m, tile_n, warps, stages in rows:
        programs = -(-m // tile_m) * -(-n // tile_n)
        most = 8 * sms if m <= 64 else 2 * sms if tile_m == 64 else 0  # larger tiles' float32 results would spill
        splits = [s for s in (1, 2, 4, 8, 16) if s == 1 or (steps >= 2 * s and programs * s <= most)]
        tiles += [Tile(tile_m, tile_n, split, warps, stages) for split in splits[-3:]]
    return [dataclasses.asdict(tile) for tile in tiles if _fits(tile, smem, sums)]


def tile_for(m: int, k: int, n: int, *, sums: int, sms: int, smem: int, cc: int) -> Tile:
    """A first choice, before any tuning. While the weight's bytes are the limit, nearly two programs a multiprocessor;
    then the largest tile of which two fit on one. Before Hopper four warps lack registers for that."""
    if m <= 64:
        programs, split = -(-n // 64), 1
        while split * programs < 7 * sms // 4 and -(-k // STEP) // (2 * split) >= 4:
            split *= 2
        return Tile(max(16, pl.next_power_of_2(m)), 64, split, 4, 4)
    large = -(-m // 128) * -(-n // 128)
    tile_m = 128 if sums == 1 and large >= 7 * sms // 8 else 64
    deep = Tile(tile_m, 128, 1, 8 if tile_m == 128 and cc < 90 else 4, 4)  # for a program alone on its multiprocessor
    alone = -(-m // tile_m) * -(-n // 128) <= sms
    return deep if alone and _fits(deep, smem, sums) else dataclasses.replace(deep, stages=3)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static facts of one call."""

    m: int
    n: int
    k: int
    group: int
    block_n: int
    x_columns: int  # of x's scales
    columns: int  # of the weight's scales
    tile: Tile

    @property
    def steps(self) -> int:
        """Steps along K."""
        return -(-self.k // STEP)

    @property
    def share(self) -> int:
        """Steps of a program."""
        return -(-self.steps // self.tile.split_k)

    @property
    def weight_first(self) -> bool:
        """Whether the weight is the first operand of the dot: its tile is the one with 64 rows."""
        return self.tile.tile_m < 64

    @property
    def scale_last(self) -> bool:
        """Whether one scale a row can wait for the end."""
        return self.columns == 1 and self.x_columns == 1


def _place(plan: _Plan, program: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row of x and first row of the weight of a program: see the drawing above."""
    tiles_m, tiles_n = -(-plan.m // plan.tile.tile_m), -(-plan.n // plan.tile.tile_n)
    band, inside = program // (BAND * tiles_n), program % (BAND * tiles_n)
    height = jnp.minimum(tiles_m - band * BAND, BAND)
    return (band * BAND + inside % height) * plan.tile.tile_m, inside // height * plan.tile.tile_n


def _kernel(plan: _Plan, names: tuple[str, ...], activation: Activation | None, *refs: Any) -> None:
    """One program: see the module's docstring."""
    tile, at, out_ref = plan.tile, dict(zip(names, refs[:-1], strict=True)), refs[-1]
    first_x, first_w = _place(plan, pl.program_id(0))
    x_rows = jnp.minimum(first_x + jnp.arange(tile.tile_m), plan.m - 1)
    w_rows = jnp.minimum(first_w + jnp.arange(tile.tile_n), plan.n - 1)

    def multiplied(x_name: str, w_name: str, start: Any, width: int, total: Any = 0) -> jax.Array:
        """`total` and the product of some columns: `[tile_m, tile_n]`, transposed where the weight comes first."""
        x = edges.load(at[x_name], (first_x, start), (tile.tile_m, width))
        w = edges.load(at[w_name], (first_w, start), (tile.tile_n, width))
        first, second = (w, x) if plan.weight_first else (x, w)
        if x.dtype == jnp.float8_e4m3fn:
            return fp8_dot(first, second, jnp.broadcast_to(jnp.float32(total), (first.shape[0], second.shape[0])))
        return total + plgpu.dot(first, second, trans_b=True)

    def of_x(name: str, column: Any) -> jax.Array:
        """One column of an operand `[M, C]`, along the rows of x."""
        v = plgpu.load(at[name].at[x_rows, jnp.full(x_rows.shape, column)])
        return v[None, :] if plan.weight_first else v[:, None]

    def of_w(name: str, column: Any) -> jax.Array:
        """One column of an operand like `scale`, along the rows of the weight."""
        v = plgpu.load(at[name].at[w_rows // plan.block_n, jnp.full(w_rows.shape, column)])
        return v[:, None] if plan.weight_first else v[None, :]

    def scales(step: Any) -> tuple[jax.Array, jax.Array]:
        """Those of x and of the weight at a step; one number of the weight where its block has all the tile's rows."""
        column = step * STEP // plan.group if plan.columns > 1 else 0
        of_tile = plan.block_n % tile.tile_n == 0 or plan.block_n >= plan.n
        w_scale = at["scale"][first_w // plan.block_n, column] if of_tile else of_w("scale", column)
        return of_x("x_scale", step if plan.x_columns > 1 else 0), w_scale.astype(jnp.float32)

    def scaled(total: jax.Array, scales: tuple[jax.Array, jax.Array], step: Any, part: Any) -> jax.Array:
        """A sum of codes' products, less what zero points add to it, times its scales.

        `part` is the number of the step, or of the share of K that was summed."""
        if "zero_point" in at:
            column = step * STEP // plan.group if plan.columns > 1 else 0
            total = total - of_x("x_sum", part) * of_w("zero_point", column).astype(jnp.int32)
        x_scale, w_scale = scales
        return total.astype(jnp.float32) * (x_scale * w_scale)

    def one_scaled_step(step: jax.Array, carry: Any) -> Any:
        """A step with scales of its own, which were loaded during the one before."""
        total, now = carry
        later = scales(jnp.minimum(step + 1, plan.steps - 1))
        return total + scaled(multiplied("x", "codes", step * STEP, STEP), now, step, step), later

    def one_exact_step(step: jax.Array, total: jax.Array) -> jax.Array:
        """A step in int32."""
        return multiplied("x", "codes", step * STEP, STEP, total)

    def one_promoted_step(step: jax.Array, carry: Any) -> Any:
        """A step of e4m3, whose short sums join the total in float32."""
        total, part = carry
        part = multiplied("x", "codes", step * STEP, STEP, part)
        full = (step + 1) % PROMOTED == 0
        return jax.lax.cond(full, lambda: (total + part, jnp.zeros_like(part)), lambda: (total, part))

    start = pl.program_id(1) * plan.share
    stop = jnp.minimum(start + plan.share, plan.steps)
    zeros = jnp.zeros((tile.tile_n, tile.tile_m) if plan.weight_first else (tile.tile_m, tile.tile_n), jnp.float32)
    if not plan.scale_last:
        total, _ = jax.lax.fori_loop(start, stop, one_scaled_step, (zeros, scales(start)))
    elif at["x"].dtype == jnp.int8:
        total = jax.lax.fori_loop(start, stop, one_exact_step, zeros.astype(jnp.int32))
        total = scaled(total, scales(0), 0, pl.program_id(1))
    else:
        total, part = jax.lax.fori_loop(start, stop, one_promoted_step, (zeros, zeros))
        total = scaled(total + part, scales(0), 0, pl.program_id(1))
    if "outlier_x" in at:
        part = multiplied("outlier_x", "outlier_w", 0, at["outlier_x"].shape[1])
        total = total + jnp.where(pl.program_id(1) == 0, part, 0.0)
    total = total.T if plan.weight_first else total
    place = pl.ds(first_x, tile.tile_m), pl.ds(first_w, tile.tile_n)
    inside = edges.inside(total.shape, (first_x, first_w), (plan.m, plan.n))
    if "bias" in at:
        total = total + plgpu.load(at["bias"].at[w_rows]).astype(jnp.float32)[None, :]
    if activation is not None:
        total = activation(total)
    if "residual" in at:
        total = total + edges.load(at["residual"], (first_x, first_w), total.shape).astype(jnp.float32)
    plgpu.store(out_ref.at[pl.program_id(1), *place], total.astype(out_ref.dtype), mask=inside)


def _sums_of_codes(x: jax.Array, unit: int) -> jax.Array:
    """int32 `[M, ceil(K / unit)]`: sums of x's codes over `unit` columns each."""
    m, k = x.shape
    return jnp.sum(jnp.pad(x, [(0, 0), (0, -k % unit)]).reshape(m, -1, unit), axis=2, dtype=jnp.int32)


def _lowers(activation: Activation) -> bool:
    """Whether Pallas has each operation of it for Triton: there is no erfc, of which the exact GELU is made."""
    return "erfc" not in str(jax.make_jaxpr(activation)(jnp.float32(0)))


def matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    x_scale: jax.Array,
    weight: str,
    group: int,
    block_n: int = 1,
    zero_point: jax.Array | None = None,
    outlier_x: jax.Array | None = None,
    outlier_w: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: dict[str, int] | None = None,
    sms: int = 132,
    smem: int = 227 * 1024,
    cc: int = 90,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: `int8` or `e4m3`.
      group: elements of K that share a scale of the weight; K or more for one scale a row.
      block_n: rows of the weight that share a scale; N for one in all.
      activation: elementwise, on float32.
      out_dtype: of the result.
      config: fields of `Tile`; empty takes `tile_for` the shape and the chip: `sms` multiprocessors, `smem` bytes of
        shared memory, compute capability `cc`.
      interpret: run in plain JAX on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`.
    """
    (m, k), n = x.shape, codes.shape[0]
    tile = Tile(**config) if config else tile_for(m, k, n, sums=_sums(weight, k, group), sms=sms, smem=smem, cc=cc)
    plan = _Plan(m, n, k, min(group, k), block_n, x_scale.shape[1], scale.shape[1], tile)
    operands = dict(x=x, codes=codes, x_scale=x_scale, scale=scale)
    if zero_point is not None:
        unit = STEP * (plan.share if plan.scale_last else 1)
        operands |= dict(zero_point=zero_point, x_sum=_sums_of_codes(x, unit))
    if outlier_x is not None and outlier_w is not None:
        room = pl.next_power_of_2(max(16, outlier_x.shape[1]))  # a block's size; zeros add nothing
        pad = ((0, 0), (0, room - outlier_x.shape[1]))
        operands |= dict(outlier_x=jnp.pad(outlier_x, pad), outlier_w=jnp.pad(outlier_w, pad))
    after = dict(bias=bias, residual=residual)
    whole = tile.split_k == 1 and (activation is None or _lowers(activation))
    if whole:
        operands |= {name: array for name, array in after.items() if array is not None}
    partial = pl.pallas_call(
        functools.partial(_kernel, plan, tuple(operands), activation if whole else None),
        grid=(-(-m // tile.tile_m) * -(-n // tile.tile_n), tile.split_k),
        out_shape=result((tile.split_k, m, n), out_dtype if whole else jnp.float32, *operands.values()),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"qjax_w8a8_{weight}",
    )(*operands.values())
    return (
        partial[0]
        if whole
        else finish(partial.sum(axis=0), out_dtype, global_scale=None, activation=activation, **after)
    )
