"""PTX that makes pairs of 16-bit floats from nibbles, for kernels of several backends. Text only: each has its own way
to emit it. A word holds the codes of a pair at the same place of its two halves; `$0` is the pair, `$1` the word.

    integers   word & mask | exponent    the bf16 pair 128 + code, exact;  then  + (-128 - zero)
    e2m1       sign to bit 15, exponent and mantissa to bits 8..6: the bf16 pair value * 2^-126, exact;  then  * 2^126
    tables     both bytes of each bf16 by PRMT, four codes at a time

Codes of 8 bits are neighbouring bytes of a word:

    int8       the bf16 pairs 128 + low seven bits, and 128 or, of negative codes, 256: their difference, exact
    e4m3       sign to bit 15, exponent and mantissa to bits 10..4: the bf16 pair value * 2^-120, exact;  then  * 2^120
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

PAIR = {"bfloat16": "bf16x2", "float16": "f16x2"}  # a register of two, in PTX
# What `| exponent` makes of a code, as 16-bit patterns, and in numbers: bf16 has 7 bits of mantissa, f16 has 10.
MAGIC = {"bfloat16": (0x4300, 128.0), "float16": (0x6400, 1024.0)}
# e2m1 -> float by shifts: the bit where the mantissa ends, and 2^(bias - 1).
E2M1 = {"bfloat16": (6, 2.0**126), "float16": (9, 2.0**14)}

# e4m3 -> float by shifts from each half's high byte: how far, the mask of what moves, 2^(difference of biases).
E4M3 = {"bfloat16": (4, 0x07F007F0, 2.0**120), "float16": (1, 0x3F803F80, 2.0**8)}

# Exponents of two by which scales are raised where codes are taken for the float16 numbers that their bits are: of
# integers 2^-24 times the code, of e4m3 2^-8 times its value.
RAISED = {"int4": 24, "int8": 24, "e4m3": 8}

_FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_HIGGS = (
    0.12839502985114684, 0.38804829949029207, 0.656759118532465, 0.9423404564869625,
    1.256231197347178, 1.6180463860218814, 2.069017226531385, 2.732589570995161,
)  # fmt: skip
TABLES: dict[str, tuple[float, ...]] = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*_FP4, *(-v for v in _FP4)),
    "higgs4": (*(-v for v in _HIGGS[::-1]), *_HIGGS),
}  # fmt: skip


def constant(value: float, dtype: str) -> str:
    """A register with `value` in both halves."""
    bits = int(np.array(value, jnp.dtype(dtype)).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


def with_exponent(bits: int, dtype: str, into: str = "v", word: str = "$1") -> str:
    """`into = word & mask | exponent`: pairs `offset + code`, for codes at the halves' low ends."""
    mask, (exponent, _) = (2**bits - 1) * 0x00010001, MAGIC[dtype]
    return f"lop3.b32 {into}, {word}, 0x{mask:08x}, 0x{exponent:04x}{exponent:04x}, 0xEA;"


def scaled(factor: str, dtype: str) -> str:
    """`$1 * factor` on pairs; as a sum with -0, which sm_80 has too."""
    zero = constant(-0.0, dtype)
    return f"{{ .reg .b32 f, a; mov.b32 f, {factor}; mov.b32 a, {zero}; fma.rn.{PAIR[dtype]} $0, $1, f, a; }}"


def pair(nibble: int, weight: str, dtype: str, less: str | None) -> str:
    """The values at a nibble of both halves of a word of 4-bit codes.

    Args:
      nibble: 0 to 3, from the low end.
      weight: "int4" or a key of `TABLES`.
      less: a register with `-offset - zero point`, of integers (`MAGIC`); None for the middle code.
    """
    if weight == "int4":
        less = less or constant(-MAGIC[dtype][1] - 8, dtype)
        return (
            f"{{ .reg .b32 s, v, a; shr.b32 s, $1, {4 * nibble}; mov.b32 a, {less}; "
            f"{with_exponent(4, dtype, word='s')} add.rn.{PAIR[dtype]} $0, v, a; }}"
        )
    if weight == "e2m1":
        end, factor = E2M1[dtype]
        if end == 6:  # sign to bit 15 and the rest to bits 8..6 by one product, in which nothing overlaps
            by = 0x1040 >> (4 * (nibble % 2))
            return (
                f"{{ .reg .b32 s, v, f, a; shr.b32 s, $1, {8 * (nibble // 2)}; "
                f"and.b32 s, s, 0x{0x000F000F << (4 * (nibble % 2)):08x}; mul.lo.u32 s, s, 0x{by:x}; "
                f"and.b32 v, s, 0x81c081c0; mov.b32 f, {constant(factor, dtype)}; "
                f"mov.b32 a, {constant(-0.0, dtype)}; fma.rn.{PAIR[dtype]} $0, v, f, a; }}"
            )
        by = end - 4 * nibble
        move = f"shl.b32 b, $1, {by};" if by >= 0 else f"shr.b32 b, $1, {-by};"
        return (
            f"{{ .reg .b32 b, s, v, f, a; {move} shl.b32 s, $1, {12 - 4 * nibble}; "
            f"and.b32 b, b, 0x{(7 << end) * 0x00010001:08x}; lop3.b32 v, s, 0x80008000, b, 0xEA; "
            f"mov.b32 f, {constant(factor, dtype)}; mov.b32 a, {constant(-0.0, dtype)}; "
            f"fma.rn.{PAIR[dtype]} $0, v, f, a; }}"
        )
    return look_up(nibble, TABLES[weight], dtype)


def scaled_code(nibble: int) -> str:
    """`(code - 8) * scale` of int4 in float16, `$2` being pairs of 2^24 times the scale.

    A nibble at the low end of a half is the subnormal number code * 2^-24, one place higher it is 16 times that: a
    mask, and one product and sum that is rounded once, for 8 scales are a scale with another exponent.
    """
    by, up = divmod(nibble, 2)
    half = "float16"
    return (
        f"{{ .reg .b32 s, v, a, c, f; shr.b32 s, $1, {8 * by}; and.b32 v, s, 0x{0x000F000F << 4 * up:08x}; "
        f"mov.b32 c, {constant(2.0 ** (-4 * up), half)}; mul.rn.f16x2 f, $2, c; "
        f"mov.b32 c, {constant(-(2.0**-21), half)}; mul.rn.f16x2 a, $2, c; fma.rn.f16x2 $0, v, f, a; }}"
    )


def scaled_byte_pair(second: int, weight: str) -> str:
    """`code * scale` in float16 of the first or second two of a word's four codes, `$2` being pairs of
    `2 ** RAISED[weight]` times the scale: as of `scaled_code`, of int8 less 128 instead of 8; the bits of e4m3 are
    float16's of 2^-8 times it."""
    if weight == "e4m3":
        shift, mask, _ = E4M3["float16"]
        return (
            f"{{ .reg .b32 h, s, v, a; prmt.b32 h, $1, 0, 0x{(0x1404, 0x3424)[second]:04x}; shr.b32 s, h, {shift}; "
            f"and.b32 s, s, 0x{mask:08x}; lop3.b32 v, h, 0x80008000, s, 0xEA; "
            f"mov.b32 a, {constant(-0.0, 'float16')}; fma.rn.f16x2 $0, v, $2, a; }}"
        )
    return (
        f"{{ .reg .b32 u, v, a, c; xor.b32 u, $1, 0x80808080; prmt.b32 v, u, 0, 0x{(0x4140, 0x4342)[second]:04x}; "
        f"mov.b32 c, {constant(-(2.0**-17), 'float16')}; mul.rn.f16x2 a, $2, c; fma.rn.f16x2 $0, v, $2, a; }}"
    )


def byte_pair(second: int, weight: str, dtype: str) -> str:
    """The values of the first or second two of a word's four codes of 8 bits, "int8" or "e4m3"."""
    if weight == "e4m3":
        shift, mask, factor = E4M3[dtype]
        return (
            f"{{ .reg .b32 h, s, v, f, a; prmt.b32 h, $1, 0, 0x{(0x1404, 0x3424)[second]:04x}; shr.b32 s, h, {shift}; "
            f"and.b32 s, s, 0x{mask:08x}; lop3.b32 v, h, 0x80008000, s, 0xEA; mov.b32 f, {constant(factor, dtype)}; "
            f"mov.b32 a, {constant(-0.0, dtype)}; fma.rn.{PAIR[dtype]} $0, v, f, a; }}"
        )
    bytes_ = f"prmt.b32 h, $1, 0, 0x{(0x4140, 0x4342)[second]:04x};"
    exponent = f"0x{MAGIC[dtype][0] * 0x00010001:08x}"
    if dtype == "float16":  # which has room for the whole code behind its exponent
        return (
            f"{{ .reg .b32 h, v, a; {bytes_} lop3.b32 v, h, 0x00800080, {exponent}, 0xBE; "
            f"mov.b32 a, {constant(-MAGIC[dtype][1] - 128, dtype)}; add.rn.f16x2 $0, v, a; }}"
        )
    return (
        f"{{ .reg .b32 h, v, s, f; {bytes_} lop3.b32 v, h, 0x007f007f, {exponent}, 0xEA; "
        f"lop3.b32 s, h, 0x00800080, {exponent}, 0xEA; mov.b32 f, {constant(-1.0, dtype)}; "
        f"fma.rn.{PAIR[dtype]} $0, s, f, v; }}"
    )


def both(dtype: str) -> str:
    """A float32 register `$1` -> a pair of it, rounded."""
    return f"cvt.rn.{PAIR[dtype]}.f32 $0, $1, $1;"


def _table_registers(table: tuple[float, ...], dtype: str, high: bool) -> list[str]:
    """Four registers with the low or high bytes of a table's 16 values, in the order of the codes."""
    bits: Any = np.array(table, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    part = ((bits >> 8) if high else (bits & 0xFF)).astype(np.uint32)
    return [f"0x{sum(int(part[4 * r + i]) << (8 * i) for i in range(4)):08x}" for r in range(4)]


def look_up(t: int, table: tuple[float, ...], dtype: str) -> str:
    """The table's values at nibble t of both halves of a word.

    PRMT looks four codes up in 8 bytes by their low three bits: once for codes 0..7, once for 8..15, and a third PRMT
    takes the one that the code's top bit names; so for the low bytes and for the high ones. The four codes are two
    neighbouring nibbles of either half: what the other nibble needs too is said again, and the assembler merges it.
    """

    def bytes_of(to: str, r: list[str]) -> str:
        return (
            f"mov.b32 c, {r[0]}; mov.b32 d, {r[1]}; prmt.b32 a, c, d, i; "
            f"mov.b32 c, {r[2]}; mov.b32 d, {r[3]}; prmt.b32 b, c, d, i; prmt.b32 {to}, a, b, s; "
        )

    low, high = (_table_registers(table, dtype, part) for part in (False, True))
    return (
        "{ .reg .b32 v, i, s, a, b, c, d, low, high; "
        f"prmt.b32 v, $1, $1, 0x00{2 + t // 2}{t // 2}; and.b32 i, v, 0x7777; "
        "shr.b32 s, v, 1; lop3.b32 s, s, 0x4444, 0x3210, 0xEA; "
        f"{bytes_of('low', low)}{bytes_of('high', high)}prmt.b32 $0, low, high, {'0x7351' if t % 2 else '0x6240'}; }}"
    )
