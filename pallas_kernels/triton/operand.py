"""Words of packed codes -> the first operand of the tensor cores, inside a kernel: `[R, words]` in, `[R, 128]` out.

The packed order is made for this: the thread that holds column c of `mma`'s first operand finds in its own words, pair
by pair (l = 0, 1), just the values that it must hold (`k = 32j + 16s + 8h + 2c + l = 8t + 2c + l`). So the way from
words to operand is shifts and masks in registers; no value changes its thread. In Pallas it is said with shapes, and
Triton finds that nothing moves:

    words [R, (c, t_high)] --16/bits shifts--> pairs [R, (c, t_high)] for each t_low
            --join l, t_low--> [R, c, t_high, l, t_low] --transpose, reshape--> [R, (t_high, t_low, c, l)]

A pair is one register of two values of x's type:

    integers   (word >> b*t) & mask | 0x43004300      the bf16 pair 128 + code, exact;  then  + (-128 - zero)
    e2m1       sign to bit 15, exponent and mantissa to bits 8..6: the bf16 pair value * 2^-126, exact;  then  * 2^126
    tables     both bytes of each bf16 by PRMT, four codes at a time

A block may come out in pieces of 64, 32 or 16 columns, one for each group of scales: t's highest bits number them.
Widths of several planes (3, 5, 6 bits) are put together as integers before. PTX is used where Pallas has no word: sums
and products of packed pairs, and PRMT. `interpret` gives the same values in plain operations, on any machine.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

BLOCK = 128
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}

_PAIR = {"bfloat16": "bf16x2", "float16": "f16x2"}  # a register of two, in PTX
# What `| exponent` makes of a code, as 16-bit patterns: bf16 has 7 bits of mantissa, f16 has 10.
_MAGIC = {"bfloat16": (0x4300, 128.0), "float16": (0x6400, 1024.0)}
# e2m1 -> float by shifts: the bit where the mantissa ends, and 2^(bias - 1).
_E2M1 = {"bfloat16": (6, 2.0**126), "float16": (9, 2.0**14)}

_FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
TABLES: dict[str, tuple[float, ...]] = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*_FP4, *(-v for v in _FP4)),
}  # fmt: skip


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


def _constant(value: float, dtype: str) -> str:
    """A register with `value` in both halves."""
    bits = int(np.array(value, jnp.dtype(dtype)).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


def _integer_pairs(codes: jax.Array, bits: int, dtype: str, zero: jax.Array | None) -> jax.Array:
    """`code - zero` of both halves, exact; zero: integers in float32 `[R, 1]`, or None for `2^(bits - 1)`."""
    exponent, offset = _MAGIC[dtype]
    mask = (2**bits - 1) * 0x00010001
    args, name = [codes], _constant(-(offset + 2.0 ** (bits - 1)), dtype)
    if zero is not None:
        args, name = [codes, jnp.broadcast_to(_pair_of(-offset - zero, dtype), codes.shape)], "$2"
    return _asm(
        "{ .reg .b32 v, f, a; "
        f"mov.b32 f, {_constant(1.0, dtype)}; mov.b32 a, {name}; "
        f"lop3.b32 v, $1, 0x{mask:08x}, 0x{exponent:04x}{exponent:04x}, 0xEA; fma.rn.{_PAIR[dtype]} $0, v, f, a; }}",
        args,
    )


def _scaled(pairs: jax.Array, factor: float | jax.Array, dtype: str) -> jax.Array:
    """Both halves times a constant, or times float32 `[R, 1]`; as a sum with -0, which sm_80 has too."""
    args, name = [pairs], "$2"
    if isinstance(factor, float):
        name = _constant(factor, dtype)
    else:
        args.append(jnp.broadcast_to(_pair_of(factor, dtype), pairs.shape))
    zero = _constant(-0.0, dtype)
    text = f"{{ .reg .b32 f, a; mov.b32 f, {name}; mov.b32 a, {zero}; fma.rn.{_PAIR[dtype]} $0, $1, f, a; }}"
    return _asm(text, args)


def _pair_of(value: jax.Array, dtype: str) -> jax.Array:
    """float32 -> a register with the value, in `dtype`, in both halves."""
    return _asm(f"cvt.rn.{_PAIR[dtype]}.f32 $0, $1, $1;", [jax.lax.bitcast_convert_type(value, jnp.uint32)])


def _table_registers(table: tuple[float, ...], dtype: str, high: bool) -> list[str]:
    """Four registers with the low or high bytes of a table's 16 values, in the order of the codes."""
    bits = np.array(table, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    part = ((bits >> 8) if high else (bits & 0xFF)).astype(np.uint32)
    return [f"0x{sum(int(part[4 * r + i]) << (8 * i) for i in range(4)):08x}" for r in range(4)]


def _look_up(words: jax.Array, t: int, table: tuple[float, ...], dtype: str) -> jax.Array:
    """The table's values at nibble t of both halves of each word.

    PRMT looks four codes up in 8 bytes by their low three bits: once for codes 0..7, once for 8..15, and a third PRMT
    takes the one that the code's top bit names; so for the low bytes and for the high ones. The four codes are two
    neighbouring nibbles of either half: what the other nibble needs too is said again, and the assembler merges it.
    """

    def look_up(to: str, r: list[str]) -> str:
        return (
            f"mov.b32 c, {r[0]}; mov.b32 d, {r[1]}; prmt.b32 a, c, d, i; "
            f"mov.b32 c, {r[2]}; mov.b32 d, {r[3]}; prmt.b32 b, c, d, i; prmt.b32 {to}, a, b, s; "
        )

    low, high = (_table_registers(table, dtype, part) for part in (False, True))
    return _asm(
        "{ .reg .b32 v, i, s, a, b, c, d, low, high; "
        f"prmt.b32 v, $1, $1, 0x00{2 + t // 2}{t // 2}; and.b32 i, v, 0x7777; "
        "shr.b32 s, v, 1; lop3.b32 s, s, 0x4444, 0x3210, 0xEA; "
        f"{look_up('low', low)}{look_up('high', high)}prmt.b32 $0, low, high, {'0x7351' if t % 2 else '0x6240'}; }}",
        [words],
    )


def _e2m1_pairs(words: jax.Array, t: int, dtype: str) -> jax.Array:
    """e2m1 values at nibble t of both halves of each word, exact."""
    end, factor = _E2M1[dtype]
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
        pairs = _look_up(words, t, TABLES[weight], dtype)
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
