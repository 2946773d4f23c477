"""Words of packed codes -> the first operand of the tensor cores, inside a kernel: `[R, words]` in, `[R, 128]` out.

The packed order is made for this: the thread that holds column c of `mma`'s first operand finds in its own words, pair
by pair (l = 0, 1), just the values that it must hold (`k = 32j + 16s + 8h + 2c + l = 8t + 2c + l`). So the way from
words to operand is shifts and masks in registers; no value changes its thread. In Pallas it is said with shapes, and
Triton finds that nothing moves:

    words [R, (c, t_high)] --16/bits shifts--> pairs [R, (c, t_high)] for each t_low
            --join l, t_low--> [R, c, t_high, l, t_low] --transpose, reshape--> [R, (t_high, t_low, c, l)]

How two codes become a pair of values of x's type, one register, is in `pallas_kernels.pairs`.

A block may come out in pieces of 64, 32 or 16 columns, one for each group of scales: t's highest bits number them.
Widths of several planes (3, 5, 6 bits) are put together as integers before. PTX is used where Pallas has no word: sums
and products of packed pairs, and PRMT. `interpret` gives the same values in plain operations, on any machine.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.pairs import E2M1, MAGIC, PAIR, TABLES, both, constant, look_up, scaled, with_exponent

BLOCK = 128
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def plane_words(bits: int) -> list[tuple[int, int]]:
    """`(first word, words)` of each plane in a block."""
    widths = PLANES[bits]
    return [(4 * sum(widths[:i]), 4 * width) for i, width in enumerate(widths)]


def _join(parts: list[jax.Array]) -> jax.Array:
    """`2^n` tiles `[...]` -> `[..., 2, 2, ...]`, the last axis being the lowest bit of the index into `parts`."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    pairs = [
        jnp.concatenate([a[..., None], b[..., None]], axis=-1) for a, b in zip(parts[:half], parts[half:], strict=True)
    ]
    return _join(pairs)


def _left(words: jax.Array, by: int) -> jax.Array:
    """Shifted to the left, or to the right by a negative number of bits."""
    return words << jnp.uint32(by) if by >= 0 else words >> jnp.uint32(-by)


def _code_pairs(planes: list[jax.Array], bits: int) -> list[jax.Array]:
    """Codes, two a register, other bits beside them: uint32 `[R, 4 * widest]` for each t_low of the widest plane."""
    widths = PLANES[bits]
    widest, rows = widths[0], planes[0].shape[0]
    codes = [planes[0] >> jnp.uint32(widest * t) for t in range(16 // widest)]
    low = widest
    for width, words in zip(widths[1:], planes[1:], strict=True):
        keep = jnp.uint32((2**low - 1) * 0x00010001)
        take = jnp.uint32((2**width - 1) * 0x00010001 << low)
        # a word of this plane serves several of the widest: each has it shifted to its own part
        several = widest // width
        part = jax.lax.broadcasted_iota(jnp.uint32, (1, 1, several), 2) * jnp.uint32(16 // several)
        mine = (jnp.broadcast_to(words[:, :, None], (*words.shape, several)) >> part).reshape(rows, 4 * widest)
        codes = [(code & keep) | (_left(mine, low - width * t) & take) for t, code in enumerate(codes)]
        low += width
    return codes


def _asm(text: str, args: list[jax.Array]) -> jax.Array:
    """Registers `[R, W]` -> registers, uint32, element by element."""
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.int32)  # the only registers that Triton takes
    constraints = ",".join(["=r"] + ["r"] * len(args))
    (result,) = plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )
    return result.astype(jnp.uint32)


def _integer_pairs(codes: jax.Array, bits: int, dtype: str, zero: jax.Array | None) -> jax.Array:
    """`code - zero` of both halves, exact; zero: integers in float32 `[R, 1]`, or None for `2^(bits - 1)`."""
    _, offset = MAGIC[dtype]
    args, name = [codes], constant(-(offset + 2.0 ** (bits - 1)), dtype)
    if zero is not None:
        args, name = [codes, jnp.broadcast_to(_pair_of(-offset - zero, dtype), codes.shape)], "$2"
    return _asm(
        "{ .reg .b32 v, f, a; "
        f"mov.b32 f, {constant(1.0, dtype)}; mov.b32 a, {name}; "
        f"{with_exponent(bits, dtype)} fma.rn.{PAIR[dtype]} $0, v, f, a; }}",
        args,
    )


def _scaled(pairs: jax.Array, factor: float | jax.Array, dtype: str) -> jax.Array:
    """Both halves times a constant, or times float32 `[R, 1]`."""
    if isinstance(factor, float):
        return _asm(scaled(constant(factor, dtype), dtype), [pairs])
    return _asm(scaled("$2", dtype), [pairs, jnp.broadcast_to(_pair_of(factor, dtype), pairs.shape)])


def _pair_of(value: jax.Array, dtype: str) -> jax.Array:
    """float32 -> a register with the value, in `dtype`, in both halves."""
    return _asm(both(dtype), [jax.lax.bitcast_convert_type(value, jnp.uint32)])


def _e2m1_pairs(words: jax.Array, t: int, dtype: str) -> jax.Array:
    """e2m1 values at nibble t of both halves of each word, exact."""
    end, factor = E2M1[dtype]
    body = _left(words, end - 4 * t) & jnp.uint32((7 << end) * 0x00010001)
    pairs = body | (_left(words, 12 - 4 * t) & jnp.uint32(0x80008000))
    return _scaled(pairs, factor, dtype)


def _halves(pairs: jax.Array, dtype: str) -> list[jax.Array]:
    """A register of two values -> two values, l = 0 and 1. Nothing is computed: the operand is such registers again."""
    return [
        jax.lax.bitcast_convert_type((pairs >> s).astype(jnp.uint16), jnp.dtype(dtype))
        for s in (jnp.uint32(0), jnp.uint32(16))
    ]


def _pairs(
    words: jax.Array, t: int, weight: str, bits: int, dtype: str, factor: jax.Array | None, zero: jax.Array | None
) -> list[jax.Array]:
    """The values of one t_low, l = 0 and 1."""
    if weight == "e2m1":
        pairs = _e2m1_pairs(words, t, dtype)
    elif weight in TABLES:
        pairs = _asm(look_up(t, TABLES[weight], dtype), [words])
    else:
        pairs = _integer_pairs(words, bits, dtype, zero)
    return _halves(pairs if factor is None else _scaled(pairs, factor, dtype), dtype)


def _plain(
    words: jax.Array, t: int, weight: str, bits: int, dtype: str, factor: jax.Array | None, zero: jax.Array | None
) -> list[jax.Array]:
    """The same in plain operations."""
    values, low = [], bits * t if weight in TABLES else 0
    for shift in (low, low + 16):
        code = (words >> jnp.uint32(shift)).astype(jnp.int32) & (2**bits - 1)
        if weight in TABLES:
            value = jnp.zeros(code.shape, jnp.float32)
            for i, entry in enumerate(TABLES[weight]):
                value = jnp.where(code == i, np.float32(entry), value)
        else:
            value = code.astype(jnp.float32) - (2 ** (bits - 1) if zero is None else zero)
        values.append(value.astype(dtype) if factor is None else value.astype(dtype) * factor.astype(dtype))
    return values


def _joined(halves: list[list[jax.Array]], highs: int) -> jax.Array:
    """Values `[R, (c, t_high)]` for each t_low and l -> `[R, columns]` in the natural order."""
    rows, lows = halves[0][0].shape[0], int(math.log2(len(halves)))
    values = _join([_join(half) for half in halves]).reshape(rows, 4, highs, 2, *(2,) * lows)  # c, t_high, l, t_low
    return values.transpose(0, 2, *range(4, values.ndim), 1, 3).reshape(rows, -1)


def _codes(planes: list[jax.Array], weight: str, bits: int) -> list[jax.Array]:
    """What the values of each t_low are made of, `[R, (c, t_high)]`."""
    return [planes[0]] * (16 // PLANES[bits][0]) if weight in TABLES else _code_pairs(planes, bits)


def operand(
    planes: list[jax.Array],
    weight: str,
    bits: int,
    dtype: str,
    factor: list[jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The values of a block, in the natural order of k.

    Args:
      planes: the block's words by planes (`plane_words`), uint32 `[R, 4 * width]`.
      weight: "int2" .. "int6", whose values are codes less the middle one, or a key of `TABLES`.
      dtype: "bfloat16" or "float16".
      factor: float32 `[R, 1]` or `[R, 4 * widest]` for each t_low: multiplies, rounded to `dtype`.
      interpret: plain operations instead of PTX.

    Returns:
      `[R, 128]` in `dtype`.
    """
    decode = _plain if interpret else _pairs
    halves = [
        decode(words, t, weight, bits, dtype, None if factor is None else factor[t], None)
        for t, words in enumerate(_codes(planes, weight, bits))
    ]
    return _joined(halves, PLANES[bits][0])


def operand_pieces(
    planes: list[jax.Array],
    weight: str,
    bits: int,
    dtype: str,
    pieces: int,
    factors: list[jax.Array] | None = None,
    zeros: list[jax.Array] | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """As `operand`, cut into pieces of `128 / pieces` columns: the operands of as many products.

    Args:
      pieces: 1, 2, 4 or 8.
      factors: for each piece float32 `[R, 1]`: multiplies it, rounded to `dtype`.
      zeros: for each piece float32 `[R, 1]`: int8 values, to subtract from codes of integers instead of the middle one.
      (others: of `operand`)

    Returns:
      for each piece `[R, 128 / pieces]` in `dtype`.
    """
    rows, widest = planes[0].shape[0], PLANES[bits][0]
    # t_high is cut first; t_low where a piece is less than a word
    cuts = min(pieces, widest)
    words = [
        jax.lax.split(code.reshape(rows, 4, widest), [widest // cuts] * cuts, axis=2)
        for code in _codes(planes, weight, bits)
    ]
    share = len(words) * cuts // pieces
    decode, found = _plain if interpret else _pairs, []
    for piece in range(pieces):
        high, low = divmod(piece, pieces // cuts)
        factor = None if factors is None else factors[piece]
        zero = None if zeros is None else zeros[piece]
        halves = [
            decode(words[t][high].reshape(rows, -1), t, weight, bits, dtype, factor, zero)
            for t in range(low * share, (low + 1) * share)
        ]
        found.append(_joined(halves, widest // cuts))
    return found
