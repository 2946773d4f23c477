"""Codes of four bits -> operands of the tensor cores, inside a kernel: a tile of words in, eight tiles of values out.

Word `4c + j` of a block of 128 holds, at nibble `4l + 2s + h`, the code of k = 32j + 16s + 8h + 2c + l. Fixing the
nibble p gives one code from each of a block's 16 words: a tile [N, 16] whose columns are words, to be multiplied by the
x of those 16 k (`matmul_4bit.in_word_order` puts them side by side). Two neighbouring words w0, w1 of a row make one
register of two values, which is what `mma` takes:

    halves:  lo = w0[0:16] | w1[0:16] << 16        l = 0        hi = w0[16:32] | w1[16:32] << 16        l = 1
    int4:    (lo >> 4t) & 0x000f000f | 0x43004300   = bf16 pair 128 + code, exact;  then  + (-136)
    e2m1:    sign to bit 15, exponent and mantissa to bits 8..6: bf16 value * 2^-126, exact;  then  * 2^126
    tables:  the two bytes of a bf16 by PRMT from 2 x 4 registers, for the four nibbles of a half word at once

The conversions are PTX because neither a 16-bit pair nor a byte permutation can be said in Pallas. `interpret` gives
the same values in plain operations, for machines without a GPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

POSITIONS = 8  # nibbles of a word; position p = 4l + 2s + h

# One, and what `| exponent` makes of a code, as 16-bit patterns: bf16 has 7 bits of mantissa, f16 has 10.
_MAGIC = {"bfloat16": (0x4300, 128.0), "float16": (0x6400, 1024.0)}
# e2m1 -> float by shifts: (bits left of the mantissa's end, mask of exponent and mantissa, 2^(bias - 1)).
_E2M1_SHIFT = {"bfloat16": (6, 2.0**126), "float16": (9, 2.0**14)}

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*_FP4, *(-v for v in _FP4)),
}  # fmt: skip


def _pair(value: float, dtype: str) -> str:
    """A constant register with `value` in both halves."""
    bits = int(np.array(value, jnp.dtype(dtype)).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


def _asm(text: str, constraints: str, args: list[jax.Array], dtype: jnp.dtype, pack: int = 2) -> jax.Array:
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    (result,) = plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return result


def halves(words: jax.Array) -> jax.Array:
    """Words `[N, 16]` -> int32 `[N, 16]`: of each two columns the low halves, then the high halves."""
    text = "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;"
    return _asm(text, "=&r,=r,r,r", [words], jnp.int32)


def _fma(dtype: str) -> str:
    """Fused multiply-add of two packed halves: subtraction and multiplication of bf16 pairs need sm_90, this sm_80."""
    return "fma.rn.bf16x2" if dtype == "bfloat16" else "fma.rn.f16x2"


def int4_values(pairs: jax.Array, position: int, dtype: str) -> jax.Array:
    """`code - 8` at one nibble of all words, exact.

    Args:
      pairs: of `halves`.
      position: 0..7.
      dtype: "bfloat16" or "float16".
    """
    magic, offset = _MAGIC[dtype]
    half, t = divmod(position, 4)
    text = (
        "{ .reg .b32 v, e, o; "
        f"mov.b32 o, {_pair(1.0, dtype)}; mov.b32 e, {_pair(-(offset + 8), dtype)}; shr.b32 v, ${1 + half}, {4 * t}; "
        f"lop3.b32 v, v, 0x000f000f, 0x{magic:04x}{magic:04x}, 0xEA; {_fma(dtype)} $0, v, o, e; }}"
    )
    return _asm(text, "=r,r,r", [pairs], jnp.dtype(dtype))


def e2m1_values(pairs: jax.Array, position: int, dtype: str) -> jax.Array:
    """The e2m1 value at one nibble of all words, exact."""
    end, factor = _E2M1_SHIFT[dtype]
    half, t = divmod(position, 4)

    def shifted(by: int) -> str:
        return f"shl.b32 v, ${1 + half}, {by};" if by >= 0 else f"shr.b32 v, ${1 + half}, {-by};"

    body = 7 << end
    text = (
        "{ .reg .b32 v, s, o, z; "
        f"mov.b32 o, {_pair(factor, dtype)}; mov.b32 z, 0x80008000; "
        f"{shifted(12 - 4 * t)} and.b32 s, v, 0x80008000; "
        f"{shifted(end - 4 * t)} lop3.b32 v, v, 0x{body:04x}{body:04x}, s, 0xEA; {_fma(dtype)} $0, v, o, z; }}"
    )
    return _asm(text, "=r,r,r", [pairs], jnp.dtype(dtype))


def _table_bytes(table: tuple[float, ...], dtype: str, high: bool) -> list[str]:
    """Four registers with the low or high bytes of a table's 16 values, in the order of the codes."""
    bits = np.array(table, np.float32).astype(jnp.dtype(dtype)).view(np.uint16)
    part = ((bits >> 8) if high else (bits & 0xFF)).astype(np.uint32)
    return [f"0x{sum(int(part[4 * r + i]) << (8 * i) for i in range(4)):08x}" for r in range(4)]


def table_bytes(words: jax.Array, half: int, table: tuple[float, ...], dtype: str, high: bool) -> jax.Array:
    """Low or high bytes of the table's values for the four nibbles of one half of each word: int32 `[N, 16]`.

    PRMT looks 4 codes up at once in 8 bytes by their low three bits; once for codes 0..7, once for 8..15, and a third
    PRMT takes of each byte pair the one that the code's top bit names.
    """
    t = _table_bytes(table, dtype, high)
    shift = f"shr.b32 w, $1, {16 * half};"
    text = (
        "{ .reg .b32 w, i, a, b, c, d, s; "
        f"{shift} and.b32 i, w, 0x7777; "
        f"mov.b32 c, {t[0]}; mov.b32 d, {t[1]}; prmt.b32 a, c, d, i; "
        f"mov.b32 c, {t[2]}; mov.b32 d, {t[3]}; prmt.b32 b, c, d, i; "
        "shr.b32 s, w, 1; lop3.b32 s, s, 0x4444, 0x3210, 0xEA; prmt.b32 $0, a, b, s; }"
    )
    return _asm(text, "=r,r", [words], jnp.int32, pack=1)


def table_values(low: jax.Array, high: jax.Array, t: int, dtype: str) -> jax.Array:
    """Values at nibble t of one half, from the bytes of `table_bytes`: pairs of two neighbouring words."""
    # $1, $2: low bytes of w0, w1; $3, $4: their high bytes. Byte t of each, interleaved.
    select = (4 + t) << 4 | t
    text = (
        "{ .reg .b32 a, b; "
        f"prmt.b32 a, $1, $3, 0x{select:04x}; prmt.b32 b, $2, $4, 0x{select:04x}; prmt.b32 $0, a, b, 0x5410; }}"
    )
    return _asm(text, "=r,r,r,r,r", [low, high], jnp.dtype(dtype))


def _plain(words: jax.Array, position: int, table: tuple[float, ...] | None, dtype: str) -> jax.Array:
    """The same values in plain operations."""
    code = ((words >> jnp.uint32(4 * position)) & jnp.uint32(15)).astype(jnp.int32)
    if table is None:
        return (code - 8).astype(dtype)
    value = jnp.zeros(code.shape, jnp.float32)
    for i, entry in enumerate(table):
        value = jnp.where(code == i, np.float32(entry), value)
    return value.astype(dtype)


def reader(weight: str, words: jax.Array, dtype: str, interpret: bool) -> Callable[[int], jax.Array]:
    """How to read one tile of words.

    Args:
      weight: "int4", "e2m1", or a key of `TABLES`.
      words: uint32 `[N, 16]`.
      dtype: of the values, "bfloat16" or "float16".
      interpret: plain operations instead of PTX.

    Returns:
      `position -> [N, 16]` in `dtype`: values at one nibble of all words; int4 codes minus 8.
    """
    if interpret:
        table = {"e2m1": E2M1, **TABLES}.get(weight)
        return lambda position: _plain(words, position, table, dtype)
    if weight in TABLES:
        parts = {(h, b): table_bytes(words, h, TABLES[weight], dtype, bool(b)) for h in (0, 1) for b in (0, 1)}

        def look_up(position: int) -> jax.Array:
            half, t = divmod(position, 4)
            return table_values(parts[half, 0], parts[half, 1], t, dtype)

        return look_up
    pairs = halves(words)
    values = e2m1_values if weight == "e2m1" else int4_values
    return lambda position: values(pairs, position, dtype)
