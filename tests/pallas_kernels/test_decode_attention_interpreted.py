"""Attention of one token over a cache, interpreted on a CPU, against float64: grouped heads, rows of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention import TOP, coded, exact, operands, steps_off

from pallas_kernels.triton.attention_plan import tile_for
from pallas_kernels.triton.decode_attention import decode_attention, unsupported

CAPACITY = 48
# Rows as long as can be told apart: the first token, within a block, at its edge, across shares, the last slot.
POSITIONS = (0, 1, 15, 16, 17, 30, 47)
SHARES = {"block": 16, "warps": 4, "stages": 2}
# By tensor cores; by lanes, which load a block when they need it or one before.
DOTS: dict[str, int] = {}
LANES, LANES_AHEAD = {"rows": 4, "stages": 1}, {"rows": 4}


def small_operands(
    heads: int, kv_heads: int, head_dim: int, dtype: str, positions: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    return operands(heads, kv_heads, head_dim, CAPACITY, dtype, positions)


def check(given: tuple[jax.Array, ...], config: dict[str, int], **options: float) -> None:
    found = decode_attention(*given, **options, config=SHARES | config, interpret=True)
    for got, expected in zip(found, exact(*given, **options), strict=True):
        assert got.dtype == given[0].dtype
        rounding = float(jnp.finfo(got.dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=8 * rounding)


@pytest.mark.parametrize(
    ("heads", "shares", "dtype", "way"),
    [
        ((2, 2), 1, "bfloat16", DOTS),
        ((8, 2), 2, "float32", DOTS),
        ((9, 1), 4, "bfloat16", DOTS),
        ((2, 2), 2, "bfloat16", LANES),
        ((3, 1), 1, "float32", LANES),
        ((2, 2), 1, "float32", LANES_AHEAD),
    ],
)
def test_rows_of_different_lengths_attend_to_their_own_slots(heads, shares, dtype, way):
    check(small_operands(*heads, 16, dtype, POSITIONS), {"shares": shares, **way}, scale=0.3)


@pytest.mark.parametrize(("window", "shares", "way"), [(1, 2, DOTS), (7, 1, DOTS), (20, 2, DOTS), (20, 2, LANES)])
def test_a_window_ends_with_the_token_itself(window, shares, way):
    check(small_operands(4, 2, 16, "float32", POSITIONS), {"shares": shares, **way}, scale=0.3, window=window)


@pytest.mark.parametrize("way", [DOTS, LANES], ids=str)
def test_scores_are_capped(way):
    check(small_operands(4, 2, 16, "float32", POSITIONS), {"shares": 2, **way}, scale=2.0, softcap=3.0)


@pytest.mark.parametrize("way", [DOTS, LANES], ids=str)
def test_a_head_need_not_be_a_power_of_two(way):
    check(small_operands(4, 2, 48, "bfloat16", POSITIONS), {"shares": 2, **way}, scale=0.15)


@pytest.mark.parametrize(("shares", "way"), [(1, DOTS), (2, DOTS), (2, LANES), (1, LANES_AHEAD)])
@pytest.mark.parametrize("kind", TOP)
def test_codes_and_scales_are_read_and_the_new_token_becomes_some(shares, kind, way):
    *token, keys, values = small_operands(8, 2, 16, "bfloat16", POSITIONS)
    (keys, key_scale), (values, value_scale) = (coded(a, kind) for a in (keys, values))
    options = dict(scale=0.3, config={**SHARES, "shares": shares, **way}, interpret=True)
    out, *after = decode_attention(*token, keys, values, key_scale, value_scale, **options)
    known = [a.astype(jnp.float32) * scale[..., None] for a, scale in ((keys, key_scale), (values, value_scale))]
    _, *whole = exact(*token, *known, scale=0.3)
    own = [np.asarray(a, np.float64) * scale[..., None] for a, scale in zip(after[:2], after[2:], strict=True)]
    expected, *_ = exact(*token, *known, scale=0.3, own=own)
    assert [a.dtype for a in after] == [jnp.dtype(kind), jnp.dtype(kind), jnp.float32, jnp.float32]
    assert max(map(steps_off, after[:2], after[2:], whole)) < 0.51
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)


@pytest.mark.parametrize("way", [DOTS, LANES, LANES_AHEAD], ids=str)
def test_what_lies_past_a_row_is_not_read(way):
    given = small_operands(4, 2, 16, "float32", (5, 20))
    past = jnp.arange(CAPACITY)[None, None, :, None] >= given[3][:, None, None, None]
    poisoned = [jnp.where(past, jnp.nan, a) for a in given[4:]]
    options = dict(scale=0.3, config={**SHARES, "shares": 2, **way}, interpret=True)
    clean, _, _ = decode_attention(*given, **options)
    dirty, _, _ = decode_attention(*given[:4], *poisoned, **options)
    np.testing.assert_array_equal(dirty, clean)


def test_padding_and_what_lies_past_the_capacity_are_not_stored():
    given = small_operands(2, 1, 16, "float32", (-1, CAPACITY, CAPACITY + 3, 4))
    out, keys, values = decode_attention(*given, scale=0.3, config={**SHARES, "shares": 2}, interpret=True)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(keys[:3], given[4][:3])
    np.testing.assert_array_equal(values[:3], given[5][:3])
    assert (keys[3] != given[4][3]).any()


def test_it_traces_and_differs_by_no_share_under_jit_with_donated_caches():
    given = small_operands(4, 2, 16, "float32", POSITIONS)
    step = jax.jit(lambda *a: decode_attention(*a, scale=0.3, sms=64, interpret=True), donate_argnums=(4, 5))
    expected, _, _ = exact(*given, scale=0.3)
    np.testing.assert_allclose(step(*given)[0], expected, atol=1e-5)


def test_programs_fill_the_multiprocessors_and_no_share_is_a_sliver():
    def shares(batch: int, kv_heads: int, capacity: int) -> int:
        return tile_for(kv_heads, (batch, kv_heads, capacity, 128), "bfloat16", "bfloat16", 132, 227 * 1024).shares

    assert shares(1, 32, 128) == 1
    assert shares(1, 32, 4096) * 32 == 128
    assert shares(1, 8, 8192) * 8 == 128
    assert shares(16, 32, 4096) == 1


@pytest.mark.parametrize(
    ("batch", "heads", "kind", "lanes"),
    [
        (64, 8, "bfloat16", True), (64, 32, "bfloat16", False), (1, 8, "bfloat16", True), (16, 8, "bfloat16", False),
        (64, 32, "int8", True), (1, 32, "int8", False), (64, 64, "int8", False),
        (64, 16, "float8_e4m3fn", True), (16, 8, "float8_e4m3fn", False),
    ],
)  # fmt: skip
def test_lanes_multiply_where_a_few_queries_share_a_cache(batch, heads, kind, lanes):
    tile = tile_for(heads, (batch, 8, 1024, 128), "bfloat16", kind, 132, 227 * 1024)
    assert (tile.rows > 0) == lanes
    if lanes:
        assert tile.rows * 128 * jnp.dtype(kind).itemsize == 32 * tile.warps * 16
        assert tile.block % tile.rows == 0 and (kind != "int8" or tile.block // tile.rows % 4 == 0)


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
