"""Products and sums of numbers that a thread has in registers, as few instructions: for kernels that wait for memory.

Arrays are `[R, D]` as Triton loads them, `R * D / threads` numbers a thread, which are all of one row: kernels take as
many rows as that needs. Triton compiles products and sums apart, and turns a code into a float before it multiplies;
here a product and its sum are one instruction, four where both are codes (`dp4a`). `interpret` is the same arithmetic
in plain JAX, float32 sums apart, which are rounded in another order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

_TINY = 1e-30  # of what is divided by


def _asm(text: str, constraints: str, pack: int, args: list[jax.Array], dtype: Any = jnp.float32) -> jax.Array:
    """The one result of PTX over `pack` numbers of each of `args` at a time."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    (found,) = plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return found


def _first_of(total: str, count: int) -> str:
    """PTX: of `count` results the first is the register `total`, the others are 0, which costs no instruction."""
    return f"mov.b32 $0, {total};" + "".join(f" mov.b32 ${i}, 0;" for i in range(1, count))


def dot(a: jax.Array, b: jax.Array, threads: int, interpret: bool) -> jax.Array:
    """float32 `[R, D]`, `[D]` -> float32 `[R]`."""
    b = jnp.broadcast_to(b[None, :], a.shape)
    if interpret:
        return jnp.sum(a * b, axis=1)
    n = a.size // threads
    steps = " ".join(f"fma.rn.f32 s, ${n + i}, ${2 * n + i}, s;" for i in range(1, n))
    text = f"{{ .reg .f32 s; mul.f32 s, ${n}, ${2 * n}; {steps} {_first_of('s', n)} }}"
    return jnp.sum(_asm(text, ",".join(["=f"] * n + ["f"] * 2 * n), n, [a, b]), axis=1)


def add_scaled(total: jax.Array, a: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    """`total + a * scale`, float32 `[R, D]`, the scale broadcast to it, rounded once."""
    scale = jnp.broadcast_to(scale, a.shape)
    if interpret:
        return total + a * scale
    return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, [a, scale, total])


def digits(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 `[D]` as `(256 * high + low) * scale`: int8, uint8, float32; off by half a scale, the largest / 32512."""
    scale = jnp.maximum(jnp.max(jnp.abs(a), axis=0), jnp.float32(_TINY)) / 32512
    whole = jnp.floor(a / scale + jnp.float32(0.5)).astype(jnp.int32)
    return (whole >> 8).astype(jnp.int8), (whole & 255).astype(jnp.uint8), scale


def dot_of_codes(codes: jax.Array, high: jax.Array, low: jax.Array, threads: int, interpret: bool) -> jax.Array:
    """int8 `[R, D]`, digits `[D]` -> float32 `[R]`, summed in int32, exact for D of 256 and less."""
    high, low = (jnp.broadcast_to(a[None, :], codes.shape) for a in (high, low))
    if interpret:
        whole = 256 * high.astype(jnp.int32) + low.astype(jnp.int32)
        return jnp.sum(codes.astype(jnp.int32) * whole, axis=1).astype(jnp.float32)
    n = codes.size // threads
    words = n // 4
    code, of_high, of_low = ([f"${n + words * which + i}" for i in range(words)] for which in range(3))
    steps = [f"dp4a.s32.s32 s, {c}, {d}, s;" for c, d in zip(code, of_high, strict=True)] + ["shl.b32 s, s, 8;"]
    steps += [f"dp4a.s32.u32 s, {c}, {d}, s;" for c, d in zip(code, of_low, strict=True)]
    text = f"{{ .reg .b32 s; mov.b32 s, 0; {' '.join(steps)} {_first_of('s', n)} }}"
    found = _asm(text, ",".join(["=r"] * n + ["r"] * 3 * words), n, [codes, high, low], jnp.int32)
    return jnp.sum(found, axis=1).astype(jnp.float32)


# PTX: words of four numbers of a row, $4 to $7 one row each, become words of four rows of a number, e to h.
_TURNED = """
prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $4, $5, 0x7362; prmt.b32 c, $6, $7, 0x5140; prmt.b32 d, $6, $7, 0x7362;
prmt.b32 e, a, c, 0x5410; prmt.b32 f, a, c, 0x7632; prmt.b32 g, b, d, 0x5410; prmt.b32 h, b, d, 0x7632;
"""


def add_scaled_codes(total: jax.Array, four: list[jax.Array], scales: list[jax.Array], interpret: bool) -> jax.Array:
    """`total` and the sum of four int8 `[R, D]`, times scales `[R]` of 0 and more.

    Scales are rounded to integers of 16 bits, the largest of the four being 65535, and sums are exact.
    """
    largest = jnp.maximum(functools.reduce(jnp.maximum, scales), jnp.float32(_TINY))
    # A float of 2^23 and more has integers for its last bits.
    whole = [jax.lax.bitcast_convert_type(s * (65535 / largest) + jnp.float32(2**23), jnp.int32) for s in scales]
    if interpret:
        parts = [a.astype(jnp.int32) * (s & 65535)[:, None] for a, s in zip(four, whole, strict=True)]
        found = functools.reduce(jnp.add, parts)
        return total + found.astype(jnp.float32) * (largest / 65535)[:, None]
    high, low = (
        functools.reduce(jnp.bitwise_or, [(s >> by & 255) << 8 * i for i, s in enumerate(whole)]) for by in (8, 0)
    )
    sums = " ".join(
        f"dp4a.s32.u32 s, {r}, $8, 0; shl.b32 s, s, 8; dp4a.s32.u32 s, {r}, $12, s; cvt.rn.f32.s32 r{i}, s;"
        for i, r in enumerate("efgh")
    )
    out = " ".join(f"mov.f32 ${i}, r{i};" for i in range(4))
    text = f"{{ .reg .b32 a, b, c, d, e, f, g, h, s; .reg .f32 r0, r1, r2, r3; {_TURNED} {sums} {out} }}"
    args = [*four, *(jnp.broadcast_to(a[:, None], total.shape) for a in (high, low))]
    found = _asm(text, ",".join(["=f"] * 4 + ["r"] * 12), 4, args)
    return add_scaled(total, found, (largest / 65535)[:, None], interpret)
