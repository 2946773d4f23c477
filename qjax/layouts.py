"""The packed order of codes below 8 bits: codes <-> uint32 words. Knows nothing of scales or formats.

A row of K codes (K padded to a multiple of 128) is cut into blocks of 128; a block of b-bit codes is 4*b words. Inside
a block the words hold the codes in the order in which tensor cores take their first operand (`mma.m16n8k16`): with

    k = 32*j + 16*s + 8*h + 2*c + l      j, c in 0..3;  s, h, l in 0..1
    t = 4*j + 2*s + h                    0..15

a plane of b bits (b = 1, 2, 4) has 4*b words, and the code of k lies in

    word  b*c + t // (16/b)    at bit    16*l + b*(t % (16/b))

so that for 4 bits the thread of column c reads words 4c..4c+3, and `(word >> 4*(2s+h)) & 0x000f000f` is a pair (l = 0,
1) of its operand. Widths that are no power of two are planes one after another inside the block, low bits in the wide
one: 3 bits are a plane of 2 and one of 1. No code straddles a word. Blocks are an axis of their own: a shard that cuts
one is an error of shape and not a wrong answer.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # codes along K that are packed together; every width has whole words in it

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def padded(k: int) -> int:
    """K rounded up to whole blocks."""
    return -(-k // BLOCK) * BLOCK


def _pack_plane(codes: jax.Array, bits: int) -> jax.Array:
    """Codes below `2^bits`, `[..., 16, 4, 2]` over (t, c, l) -> words `[..., 4 * bits]`."""
    per_half = 16 // bits
    codes = codes.reshape(*codes.shape[:-3], bits, per_half, 4, 2)  # t_high, t_low, c, l
    shift = bits * jnp.arange(per_half, dtype=jnp.uint32)[:, None, None] + 16 * jnp.arange(2, dtype=jnp.uint32)
    words = (codes << shift).sum(axis=(-1, -3), dtype=jnp.uint32)  # t_high, c
    return words.swapaxes(-1, -2).reshape(*words.shape[:-2], 4 * bits)


def _unpack_plane(words: jax.Array, bits: int) -> jax.Array:
    """Words `[..., 4 * bits]` -> codes `[..., 16, 4, 2]` over (t, c, l)."""
    per_half = 16 // bits
    shift = bits * jnp.arange(per_half, dtype=jnp.uint32)[:, None] + 16 * jnp.arange(2, dtype=jnp.uint32)
    words = words.reshape(*words.shape[:-1], 4, bits)  # c, t_high
    codes = (words[..., None, None] >> shift) & jnp.uint32(2**bits - 1)  # c, t_high, t_low, l
    codes = jnp.moveaxis(codes, -4, -2)  # t_high, t_low, c, l
    return codes.reshape(*codes.shape[:-4], 16, 4, 2)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs unsigned codes.

    Args:
      codes: unsigned integers below `2^bits`, `[..., K]`, K a multiple of 128.
      bits: 1 to 6.

    Returns:
      uint32 `[..., K/128, 4 * bits]`.
    """
    assert codes.shape[-1] % BLOCK == 0 and bits in PLANES, (codes.shape, bits)
    blocks = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, 16, 4, 2)
    planes, low = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((blocks >> low) & jnp.uint32(2**width - 1), width))
        low += width
    return jnp.concatenate(planes, axis=-1)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The codes back: uint32 `[..., K/128, 4 * bits]` -> uint8 `[..., K]`."""
    assert packed.shape[-1] == 4 * bits and bits in PLANES, (packed.shape, bits)
    codes, word, low = None, 0, 0
    for width in PLANES[bits]:
        plane = _unpack_plane(packed[..., word : word + 4 * width], width) << low
        codes = plane if codes is None else codes | plane
        word, low = word + 4 * width, low + width
    assert codes is not None
    return codes.astype(jnp.uint8).reshape(*packed.shape[:-2], packed.shape[-2] * BLOCK)
