"""Attention of one token over a cache, interpreted on a CPU, against float64: grouped heads, rows of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton.decode_attention import decode_attention, tile_for, unsupported

CAPACITY = 48
# Rows as long as can be told apart: the first token, within a block, at its edge, across shares, the last slot.
POSITIONS = (0, 1, 15, 16, 17, 30, 47)
SHARES = {"block": 16, "warps": 4, "stages": 2}


def operands(heads: int, kv_heads: int, head_dim: int, dtype: str, positions: tuple[int, ...]) -> tuple[jax.Array, ...]:
    key = iter(jax.random.split(jax.random.key(0), 4))
    batch, cache = len(positions), (len(positions), kv_heads, CAPACITY, head_dim)
    row = jax.random.normal(next(key), (batch, (heads + 2 * kv_heads) * head_dim)).astype(dtype)
    angle = jax.random.uniform(next(key), (batch, head_dim // 2)) * 6
    keys, values = (jax.random.normal(next(key), cache).astype(dtype) for _ in range(2))
    return row, jnp.cos(angle), jnp.sin(angle), jnp.array(positions, jnp.int32), keys, values


def exact(row, cos, sin, positions, keys, values, *, scale, softcap=None, window=None):
    """The same in float64, keys and queries rounded once they are turned."""
    batch, kv_heads, capacity, head_dim = keys.shape
    dtype, heads = row.dtype, row.shape[1] // head_dim - 2 * kv_heads
    cos, sin, wide, keys, values = (np.asarray(a, np.float64) for a in (cos, sin, row, keys, values))
    wide = wide.reshape(batch, -1, head_dim)
    a, b = np.split(wide[:, : heads + kv_heads], 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    turned = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    turned = np.asarray(jnp.asarray(turned, jnp.float32).astype(dtype), np.float64)
    out = np.zeros((batch, heads, head_dim))
    for i, position in enumerate(np.asarray(positions)):
        if 0 <= position < capacity:
            keys[i, :, position], values[i, :, position] = turned[i, heads:], wide[i, heads + kv_heads :]
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            j = head * kv_heads // heads
            scores = scale * keys[i, j, first : position + 1] @ turned[i, head]
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values[i, j, first : position + 1] / weights.sum()
    return out.reshape(batch, -1), keys, values


def check(given: tuple[jax.Array, ...], shares: int, **options: float) -> None:
    found = decode_attention(*given, **options, config={**SHARES, "shares": shares}, interpret=True)
    for got, expected in zip(found, exact(*given, **options), strict=True):
        assert got.dtype == given[0].dtype
        rounding = float(jnp.finfo(got.dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=8 * rounding)


@pytest.mark.parametrize(
    ("heads", "shares", "dtype"),
    [((2, 2), 1, "bfloat16"), ((8, 2), 2, "float32"), ((9, 1), 4, "bfloat16"), ((9, 1), 1, "float32")],
)
def test_rows_of_different_lengths_attend_to_their_own_slots(heads, shares, dtype):
    check(operands(*heads, 16, dtype, POSITIONS), shares, scale=0.3)


@pytest.mark.parametrize(("window", "shares"), [(1, 2), (7, 1), (20, 2)])
def test_a_window_ends_with_the_token_itself(window, shares):
    check(operands(4, 2, 16, "float32", POSITIONS), shares, scale=0.3, window=window)


def test_scores_are_capped():
    check(operands(4, 2, 16, "float32", POSITIONS), 2, scale=2.0, softcap=3.0)


def test_a_head_need_not_be_a_power_of_two():
    check(operands(4, 2, 48, "bfloat16", POSITIONS), 2, scale=0.15)


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(("dtype", "top"), [(jnp.int8, 127), (jnp.float8_e4m3fn, 448)])
def test_codes_and_scales_are_read_and_the_new_token_becomes_some(shares, dtype, top):
    row, cos, sin, positions, keys, values = operands(8, 2, 16, "bfloat16", POSITIONS)
    scales = [jnp.max(jnp.abs(a), axis=-1).astype(jnp.float32) / top for a in (keys, values)]
    ratios = [a.astype(jnp.float32) / scale[..., None] for a, scale in zip((keys, values), scales, strict=True)]
    codes = [(jnp.round(a) if dtype == jnp.int8 else a).astype(dtype) for a in ratios]
    options = dict(scale=0.3, config={**SHARES, "shares": shares}, interpret=True)
    out, *after = decode_attention(row, cos, sin, positions, *codes, *scales, **options)
    known = [
        (a.astype(jnp.float32) * scale[..., None]).astype(jnp.float32) for a, scale in zip(codes, scales, strict=True)
    ]
    expected, keys, values = exact(row, cos, sin, positions, *known, scale=0.3)
    assert [a.dtype for a in after] == [dtype, dtype, jnp.float32, jnp.float32]
    for a, scale, whole in zip(after[:2], after[2:], (keys, values), strict=True):
        one = np.asarray(scale, np.float64)[..., None]
        step = one if dtype == jnp.int8 else np.maximum(np.abs(whole) / 8, one * 2.0**-9)
        assert (np.abs(np.asarray(a, np.float64) * one - whole) / step).max() < 0.51
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03 if dtype == jnp.int8 else 0.15)


def test_what_lies_past_a_row_is_not_read():
    given = operands(4, 2, 16, "float32", (5, 20))
    past = jnp.arange(CAPACITY)[None, None, :, None] >= given[3][:, None, None, None]
    poisoned = [jnp.where(past, jnp.nan, a) for a in given[4:]]
    options = dict(scale=0.3, config={**SHARES, "shares": 2}, interpret=True)
    clean, _, _ = decode_attention(*given, **options)
    dirty, _, _ = decode_attention(*given[:4], *poisoned, **options)
    np.testing.assert_array_equal(dirty, clean)


def test_padding_and_what_lies_past_the_capacity_are_not_stored():
    given = operands(2, 1, 16, "float32", (-1, CAPACITY, CAPACITY + 3, 4))
    out, keys, values = decode_attention(*given, scale=0.3, config={**SHARES, "shares": 2}, interpret=True)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(keys[:3], given[4][:3])
    np.testing.assert_array_equal(values[:3], given[5][:3])
    assert (keys[3] != given[4][3]).any()


def test_it_traces_and_differs_by_no_share_under_jit_with_donated_caches():
    given = operands(4, 2, 16, "float32", POSITIONS)
    step = jax.jit(lambda *a: decode_attention(*a, scale=0.3, sms=64, interpret=True), donate_argnums=(4, 5))
    expected, _, _ = exact(*given, scale=0.3)
    np.testing.assert_allclose(step(*given)[0], expected, atol=1e-5)


def test_programs_fill_the_multiprocessors_and_no_share_is_a_sliver():
    def shares(batch: int, kv_heads: int, capacity: int) -> int:
        return tile_for(batch, kv_heads, capacity, 128, 2, 132, 227 * 1024).shares

    assert shares(1, 32, 128) == 1
    assert shares(1, 32, 4096) * 32 == 128
    assert shares(1, 8, 8192) * 8 == 128
    assert shares(16, 32, 4096) == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cache": (1, 1, 64, 40)}, "heads of 40"),
        ({"dtype": "float64"}, "not float64"),
        ({"cache_dtype": "float32"}, "the cache is float32"),
        ({"cache_dtype": "int8", "dtype": "float32"}, "numbers of 16 bits"),
        ({"cache_dtype": jnp.float8_e4m3fn, "cc": 80}, "from compute capability 8.9 on"),
        ({"heads": 100}, "100 query heads to 1"),
        ({"cache_dtype": "int8", "cache": (64, 32, 16384, 128)}, "4294967296 codes"),
        ({"cc": 75}, "capability 7.5"),
    ],
    ids=str,
)
def test_what_it_cannot_do_it_says(changed, why):
    facts = dict(heads=8, cache=(1, 1, 64, 128), dtype="bfloat16", cache_dtype="bfloat16", smem=232448, cc=90)
    assert unsupported(**facts) is None
    assert why in unsupported(**(facts | changed))
