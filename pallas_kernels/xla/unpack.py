"""Stored codes -> weights in plain JAX, shaped so that XLA makes one loop of it: packed words in, rows of K out.

    w[n, k] = (code[n, k] - zero_point[n', k']) * scale[n', k']        n' = n // block_n, k' = k // group
    w[n, k] = codebook[code[n, k]] * scale[n', k']

Codes of 8 bits are `[N, K]` in their own dtype. Below 8 bits they lie in blocks of 128 k: a plane of b bits (b = 1, 2,
4) has 4b words a block, and with k = 8t + 2c + l (t in 0..15, c in 0..3, l in 0..1) the code of k is in word
`b*c + t // (16/b)` at bit `16l + b*(t % (16/b))`. Widths that are no power of two are planes one after another, low
bits in the wide one. Every index below is a reshape or a broadcast, never a gather: it costs XLA integer arithmetic.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pairs import TABLES

BLOCK = 128
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}

_TWO_23 = 0x4B000000  # float32 bits of 2^23: `| code` gives 2^23 + code


def scale_values(scale: jax.Array) -> jax.Array:
    """Scales of any dtype as float32, exactly; e8m0 byte b is 2^(b - 127), 255 is NaN."""
    if scale.dtype != jnp.float8_e8m0fnu:
        return scale.astype(jnp.float32)
    byte = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.uint32)
    bits = jnp.where(byte == 0, jnp.uint32(1 << 22), byte << 23)  # 2^-127 is subnormal
    return jax.lax.bitcast_convert_type(jnp.where(byte == 255, jnp.uint32(0x7FC00000), bits), jnp.float32)


def spread_rows(a: jax.Array, n: int, block_n: int) -> jax.Array:
    """`[R, C]` of R blocks of rows -> `[N, C]`, or `[1, C]` where one block holds all rows."""
    rows, columns = a.shape
    if rows == 1 or block_n == 1:
        return a
    return jnp.broadcast_to(a[:, None], (rows, block_n, columns)).reshape(rows * block_n, columns)[:n]


def spread_columns(a: jax.Array, k: int, group: int) -> jax.Array:
    """`[N, C]` of C groups along k -> `[N, K]`, zero past them; or `[N, 1]` where one group holds all of K."""
    columns = -(-k // group)
    if a.shape[1] == 1:
        return a
    a = jnp.pad(a, ((0, 0), (0, max(0, columns - a.shape[1]))))
    rows, columns = a.shape
    return jnp.broadcast_to(a[..., None], (rows, columns, group)).reshape(rows, columns * group)[:, :k]


def code_to_float(code: jax.Array) -> jax.Array:
    """uint32 codes below 2^23 -> float32, exact: an `or` and a subtraction, twice as fast as a conversion."""
    bits = jax.lax.bitcast_convert_type(code | jnp.uint32(_TWO_23), jnp.float32)
    return bits - jnp.float32(2.0**23)


def table(weight: str, codebook: jax.Array | None) -> jax.Array | None:
    """float32 table of a codebook format, or None; built of scalars: custom_partitioning refuses array constants."""
    if codebook is not None:
        return codebook.astype(jnp.float32)
    if weight not in TABLES:
        return None
    return jnp.concatenate([jax.lax.full((1,), v, jnp.float32) for v in TABLES[weight]])


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The codes: uint32 `[N, B, 4 * bits]` -> uint32 `[N, B * 128]`."""
    n, blocks, _ = packed.shape
    codes, word, low = jnp.zeros((), jnp.uint32), 0, 0
    for b in PLANES[bits]:
        words = packed[..., word : word + 4 * b].reshape(n, blocks, 4, b).swapaxes(2, 3)  # t // (16/b), c
        shift = b * jnp.arange(16 // b, dtype=jnp.uint32)[:, None, None] + 16 * jnp.arange(2, dtype=jnp.uint32)
        plane = (words[:, :, :, None, :, None] >> shift) & jnp.uint32(2**b - 1)
        codes = codes | plane.reshape(n, blocks * BLOCK) << low
        word, low = word + 4 * b, low + b
    return codes


def code_values(packed: jax.Array, *, weight: str, bits: int, k: int, codebook: jax.Array | None = None) -> jax.Array:
    """What codes stand for before zero point and scale: float32 `[N, K]`; unsigned below 8 bits."""
    entries = table(weight, codebook)
    if bits == 8:
        return packed.astype(jnp.float32) if entries is None else entries[packed]
    codes = unpack(packed, bits)[:, :k]
    return code_to_float(codes) if entries is None else entries.at[codes].get(mode="promise_in_bounds")


def middle(weight: str, bits: int) -> float:
    """The zero point that None means: half the range of unsigned integer codes, else 0."""
    return float(2 ** (bits - 1)) if bits < 8 and weight == f"int{bits}" else 0.0


def dequantize(
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    bits: int,
    group: int,
    block_n: int,
    k: int,
    zero_point: jax.Array | None = None,
    codebook: jax.Array | None = None,
) -> jax.Array:
    """The weight by the law in the module's docstring.

    Args:
      packed: uint32 `[N, ceil(K / 128), 4 * bits]`, or `[N, K]` codes of 8 bits.
      scale: `[ceil(N / block_n), ceil(K / group)]`, float16, bfloat16, float32, e4m3 or e8m0; or one row or column.
      weight: "int2" to "int8", "e4m3", "e5m2", or a format with a table.
      k: of the weight, padding not counted.
      zero_point: like scale, int8 or float; codebook: float32 `[2**bits]`.

    Returns:
      float32 `[N, K]`.
    """
    n = packed.shape[0]

    def spread(a: jax.Array) -> jax.Array:
        return spread_columns(spread_rows(a, n, block_n), k, group)

    values = code_values(packed, weight=weight, bits=bits, k=k, codebook=codebook)
    if zero_point is not None:
        values = values - spread(zero_point.astype(jnp.float32))
    elif middle(weight, bits):
        values = values - middle(weight, bits)
    return values * spread(scale_values(scale))
