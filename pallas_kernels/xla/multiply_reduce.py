"""y = residual + activation(x @ w + bias) for few rows of x: one reduction, with the decoding of w fused into it.

    y[m, n] = sum over units u of  scale[n, u] * sum over the unit's 32 codes of (value - zero_point) * x[m, k]

Below 8 bits a unit is the codes of one column c of a block of 128 (`unpack`): b neighbouring words of each plane,
holding k = 8t + 2c + l for all t and l. XLA gives the units of a row to the threads of a warp, so that a thread loads
16 bytes of a 4-bit weight at a time and its neighbours the next 16. The dense weight is never written. Two rows of
x are one reduction of as many operands, a code being decoded once for both; of three and four XLA would write the sums
of units to memory, so that they are two reductions, one after the other. Codes of 8 bits are multiplied one by one.

    (word & 0xf << q) | 0x4b000000  =  2^23 + code * 2^q         then  - (2^23 + zero * 2^q)  and  * x

decodes a code where it lies; sums are kept apart by q until 2^-q can multiply them, once a unit.

One row of x is one kernel on an A100 and an L4. XLA's cost model fuses the decoding with the reduction if there are
enough rows to reduce, and the faster the memory the more it asks for: on an H200 about 10,000. Below that the sums of
units go through memory, a quarter of the packed weight's bytes, or a row is cut into `shares`, whose sums are added by
a second, small fusion. `rows` of the weight may share one read of x, at the price of a small fusion that puts their
results side by side.

Numerics: products and sums in float32, one rounding, that of the result.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.finish import finish
from pallas_kernels.xla import dequantize_dot, unpack

M_MAX = 4  # rows of x: every one more is two instructions a code, and tensor cores are near
_AT_ONCE = 2  # rows of x
_UNIT = 32  # codes
_MANTISSA = 23
_ENOUGH_ROWS = 10240


@dataclasses.dataclass(frozen=True)
class Shape:
    """A configuration, for weights below 8 bits.

    Attributes:
      rows: of the weight to a thread. Divides N.
      shares: parts of a row that are reduced apart. Divides the units of a row.
      copy_x: 1 for a copy of x in float32 in the order of the units, made beforehand; 0 leaves x where it is.
    """

    rows: int
    shares: int
    copy_x: int


def unsupported(
    m: int, k: int, n: int, *, weight: str, bits: int, group: int, transposed: bool, x_dtype: str,
    x_format: str | None, features: frozenset[str], **_: Any,
) -> str | None:  # fmt: skip
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if not 0 < m <= M_MAX:
        return f"it is for 1 to {M_MAX} rows of x, here are {m}"
    if bits < 8 and group < k and (group < 8 or (unpack.BLOCK % group and group % unpack.BLOCK)):
        return f"groups of {group}: it knows 8, 16, 32, 64 and multiples of 128"
    return dequantize_dot.unsupported(m, k, n, weight=weight, x_dtype=x_dtype, x_format=x_format, features=features)


def configs(m: int, k: int, n: int, *, bits: int, **_: Any) -> list[dict[str, int]]:
    """Configurations worth measuring: fields of `Shape`."""
    if bits == 8:
        return []
    units = -(-k // unpack.BLOCK) * 4
    return [
        dataclasses.asdict(Shape(rows, shares, copy_x))
        for rows in (1, 2, 4)
        for shares in (1, 2, 4)
        for copy_x in (0, 1)
        if n % rows == 0 and units % shares == 0 and (shares == 1 or n * shares <= 4 * rows * _ENOUGH_ROWS)
    ]


def shape_for(m: int, n: int, units: int) -> Shape:
    """A first choice, before any tuning.  measured: H200, int4 g128, 22016x4096 and 4096x4096"""
    rows, shares = (2, 4) if m == 1 else (4, 2)
    return Shape(rows if n % rows == 0 else 1, shares if units % shares == 0 else 1, 1)


def _of_segments(a: jax.Array, n: int, block_n: int, group: int, blocks: int) -> list[jax.Array]:
    """Scales or zero points `[R, C]` -> one array `[N, U]` for each group that lies in a block; axes may be 1."""
    a = unpack.spread_rows(a, n, block_n)
    if a.shape[1] == 1:
        return [a]
    if group >= unpack.BLOCK:
        return [unpack.spread_columns(a, blocks * 4, group // _UNIT)]
    segments = unpack.BLOCK // group
    a = jnp.pad(a, ((0, 0), (0, blocks * segments - a.shape[1]))).reshape(-1, blocks, segments)
    return [unpack.spread_columns(a[..., i], blocks * 4, 4) for i in range(segments)]


def _x_of_units(x: jax.Array, blocks: int, copy: bool) -> jax.Array:
    """x `[M, K]` -> `[M, 8, U, 4]`, zero past K: at [t // 2, 4 * block + c, 2 * (t % 2) + l] that of one code."""
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, blocks * unpack.BLOCK - k))).reshape(m, blocks, 8, 2, 4, 2)
    x = x.transpose(0, 2, 1, 4, 3, 5).reshape(m, 8, blocks * 4, 4)
    return jax.lax.optimization_barrier(x.astype(jnp.float32)) if copy else x


def _field(word: jax.Array, bit: int, bits: int) -> tuple[jax.Array, int]:
    """2^23 + code * 2^q in float32, and q: a field of a word moved into the mantissa only where it is not in it."""
    if bit + bits > _MANTISSA:
        word, bit = word >> 12, bit - 12
    word = (word & jnp.uint32((1 << bits) - 1 << bit)) | jnp.uint32(0x4B000000)
    return jax.lax.bitcast_convert_type(word, jnp.float32), bit


def _words_of_units(packed: jax.Array, bits: int, shape: Shape) -> list[jax.Array]:
    """Each plane's words, uint32 `[rows, N / rows, shares, U / shares, b]`."""
    n, blocks, _ = packed.shape
    cut = (shape.rows, n // shape.rows, shape.shares, blocks * 4 // shape.shares)
    found, first = [], 0
    for b in unpack.PLANES[bits]:
        found.append(packed[..., first : first + 4 * b].reshape(*cut, b))
        first += 4 * b
    return found


def _less_zero(part: jax.Array, zero: jax.Array | float, q: int) -> jax.Array:
    """`(code - zero) * 2^q` of `_field`."""
    magic = jnp.float32(2.0**_MANTISSA)
    if isinstance(zero, float):
        return part - (magic + jnp.float32(zero * 2.0**q))
    shifted = zero.astype(jnp.float32) * jnp.float32(2.0**q)
    if jnp.issubdtype(zero.dtype, jnp.integer):
        return part - (magic + shifted)
    return (part - magic) - shifted  # a real zero point does not fit behind 2^23


def _values(
    planes: list[jax.Array], place: int, zero: jax.Array | float, entries: jax.Array | None
) -> list[tuple[jax.Array, int]]:
    """The code at `place` = 2t + l of every unit: `(value * 2^q, q)` of parts whose sum is its value."""
    t, half = divmod(place, 2)
    parts, code, low = [], jnp.zeros((), jnp.uint32), 0
    for plane in planes:
        b = plane.shape[-1]
        word, bit = plane[..., t // (16 // b)], 16 * half + b * (t % (16 // b))
        if entries is not None:
            code = code | ((word >> bit) & jnp.uint32((1 << b) - 1)) << low
        else:
            part, q = _field(word, bit, b)
            parts.append((_less_zero(part, 0.0 if low else zero, q), q - low))
        low += b
    return parts if entries is None else [(entries.at[code].get(mode="promise_in_bounds"), 0)]


def _unit_sums(
    planes: list[jax.Array],
    xs: jax.Array,
    scales: list[jax.Array],
    zeros: Sequence[jax.Array | float],
    entries: jax.Array | None,
) -> list[jax.Array]:
    """Scaled sums of units, `[N, S, U]`, one array for each row of x.

    Args:
      planes: words `[N, S, U, b]`; xs: `[M, 8, S, U, 4]`.
      scales, zeros: of each group inside a block, like one of the words, axes possibly 1; zeros may be numbers.
    """
    totals = [jnp.zeros((), jnp.float32)] * xs.shape[0]
    length = _UNIT // len(scales)
    for segment, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        sums: dict[int, list[jax.Array]] = {}
        for place in range(segment * length, (segment + 1) * length):
            x = xs[:, place // 4, ..., place % 4].astype(jnp.float32)
            for value, q in _values(planes, place, zero, entries):
                products = [value * row for row in x]
                sums[q] = [a + b for a, b in zip(sums[q], products, strict=True)] if q in sums else products
        parts = [[p * jnp.float32(2.0**-q) for p in products] for q, products in sums.items()]
        totals = [
            total + sum(row[1:], row[0]) * scale for total, row in zip(totals, zip(*parts, strict=True), strict=True)
        ]
    return totals


def _sum_last(operands: list[jax.Array]) -> list[jax.Array]:
    """Sums along the last axis, all in one reduction."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [u + v for u, v in zip(a, b, strict=True)]

    return list(jax.lax.reduce(operands, [jnp.float32(0)] * len(operands), add, (operands[0].ndim - 1,)))


def _packed_product(
    x: jax.Array, packed: jax.Array, scale: jax.Array, zero_point: jax.Array | None, entries: jax.Array | None,
    zero: float, bits: int, group: int, block_n: int, config: dict[str, int] | None,
) -> jax.Array:  # fmt: skip
    """float32 `[M, N]` of a weight below 8 bits."""
    (m, _k), (n, blocks) = x.shape, packed.shape[:2]
    units = blocks * 4
    shape = Shape(**config) if config else shape_for(m, n, units)
    cut = (shape.shares, units // shape.shares)

    def segments(a: jax.Array) -> list[jax.Array]:
        """`_of_segments`, each `[rows, N / rows, shares, U / shares]`, or 1 for axes of which there is one value."""
        found = _of_segments(a, n, block_n, group, blocks)
        high = (1, 1) if a.shape[0] == 1 else (shape.rows, n // shape.rows)
        return [
            jnp.broadcast_to(
                f.reshape(*high, *((1, 1) if f.shape[1] == 1 else cut)),
                (shape.rows, *high[1:], *((1, 1) if f.shape[1] == 1 else cut)),
            )
            for f in found
        ]

    planes = _words_of_units(packed, bits, shape)
    xs = _x_of_units(x, blocks, bool(shape.copy_x)).reshape(m, 8, *cut, 4)
    scales = segments(unpack.scale_values(scale))
    zeros: Sequence[jax.Array | float] = [zero] * len(scales)
    if zero_point is not None:
        zeros = segments(zero_point)
    sums = []
    for row in range(shape.rows):
        ours = [z if isinstance(z, float) else z[row] for z in zeros]
        sums += _unit_sums([p[row] for p in planes], xs, [s[row] for s in scales], ours, entries)
    # Additions, not a sum along the axis: XLA would make one reduction of the two.
    parts = [functools.reduce(jnp.add, [s[:, i] for i in range(shape.shares)]) for s in _sum_last(sums)]
    return jnp.stack(parts).reshape(shape.rows, m, n // shape.rows).swapaxes(0, 1).reshape(m, n)


def _wide_product(
    x: jax.Array, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, entries: jax.Array | None,
    group: int, block_n: int,
) -> jax.Array:  # fmt: skip
    """float32 `[M, N]` of codes of 8 bits."""
    n, k = codes.shape

    def spread(a: jax.Array) -> jax.Array:
        return unpack.spread_columns(unpack.spread_rows(a.astype(jnp.float32), n, block_n), k, group)

    values = codes.astype(jnp.float32) if entries is None else entries[codes]
    if zero_point is not None:
        values = values - spread(zero_point)
    scales = spread(unpack.scale_values(scale))
    if scales.shape[1] > 1:
        values = values * scales
    y = jnp.stack(_sum_last([values * row.astype(jnp.float32) for row in x]))
    return y * scales[:, 0] if scales.shape[1] == 1 else y


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    bits: int,
    group: int,
    block_n: int = 1,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    codebook: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      x: `[M, K]`, M of 1 to 4; float32, bfloat16 or float16.
      config: fields of `Shape`; empty takes `shape_for`.
      (others: as `unpack.dequantize` and `pallas_kernels.finish.finish`)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    entries = unpack.table(weight, codebook)
    if bits == 8:
        y = _wide_product(x, packed, scale, zero_point, entries, group, block_n)
    else:
        zero = unpack.middle(weight, bits)
        given = (packed, scale, zero_point, entries, zero, bits, group, block_n, config)
        y, rest = _packed_product(x[:_AT_ONCE], *given), x[_AT_ONCE:]
        if rest.size:
            y, rest = jax.lax.optimization_barrier((y, rest))  # else XLA makes one reduction of both
            y = jnp.concatenate([y, _packed_product(rest, *given)])
    return finish(
        y, jnp.dtype(out_dtype or x.dtype), global_scale=global_scale, bias=bias, activation=activation,
        residual=residual,
    )  # fmt: skip
