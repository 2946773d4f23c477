"""Every mode of the cuBLASLt binding by value, against float64: C++ handlers, layouts and all, on a stand-in library.

The stand-in (`fake_cublaslt.cc`) reads scales in the layouts that NVIDIA documents, so that a wrong layout is a wrong
answer here as it is on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_ffi.cublaslt import call, dense, library, matmul, microscaling

pytestmark = [pytest.mark.usefixtures("fake_cublaslt"), pytest.mark.slow]

E4M3, E5M2, BF16, F32 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float32
GELU = functools.partial(jax.nn.gelu, approximate=True)


def f64(a: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(a).astype(F32)).astype(np.float64)


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    return jnp.asarray(np.clip(rng.normal(size=shape) * 100, -448, 448), F32).astype(dtype)


def scales(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """Scales far enough apart that one in another's place shows."""
    return jnp.asarray(np.exp(rng.normal(size=shape)) * 1e-3, F32)


def spread(scale: jax.Array, rows: int, columns: int) -> np.ndarray:
    """Scales of rows, blocks of 128 or all, for each element of `[rows, columns]`."""
    s = f64(scale)
    s = s if s.shape[0] in (1, rows) else np.repeat(s, 128, 0)[:rows]
    s = s if s.shape[1] == 1 else np.repeat(s, 128, 1)[:, :columns]
    return np.broadcast_to(s, (rows, columns))


def assert_rounded_once(y: jax.Array, exact: np.ndarray, out_dtype: Any = BF16) -> None:
    """`y` is `exact` rounded to its dtype, but for the float32 sums."""
    assert y.dtype == out_dtype
    assert y.shape == exact.shape
    rounding = np.linalg.norm(f64(jnp.asarray(exact, out_dtype)) - exact)
    assert np.linalg.norm(f64(y) - exact) <= 1.05 * rounding + 1e-5 * np.linalg.norm(exact)


def operands(rng, shape, x_scale, w_scale, x_dtype=E4M3, w_dtype=E4M3):
    """x, w, their scales, the keywords that say which, and the product in float64."""
    m, k, n = shape
    c, r = -(-k // 128), -(-n // 128)
    sx = scales(rng, {"tensor": (1, 1), "row": (m, 1), "1x128": (m, c)}[x_scale])
    sw = scales(rng, {"tensor": (1, 1), "row": (n, 1), "128x128": (r, c), "1x128": (n, c)}[w_scale])
    x, w = codes(rng, (m, k), x_dtype), codes(rng, (n, k), w_dtype)
    block_n = {"tensor": n, "row": 1, "128x128": 128, "1x128": 1}[w_scale]
    facts = dict(x_scale=sx, group=128 if "128" in w_scale else k, block_n=block_n)
    exact = (f64(x) * spread(sx, m, k)) @ (f64(w) * spread(sw, n, k)).T
    return x, w, sw, facts, exact


SHAPES = [(16, 256, 64), (1, 128, 16), (5, 400, 136), (3, 16, 264), (7, 272, 200)]
PAIRS = [(x, w) for x in ("tensor", "row", "1x128") for w in ("tensor", "row", "128x128", "1x128")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("x_scale", "w_scale"), PAIRS)
def test_fp8_is_exact_but_for_one_rounding_with_every_pair_of_scales(shape, x_scale, w_scale):
    x, w, s, facts, exact = operands(np.random.default_rng(0), shape, x_scale, w_scale)
    assert_rounded_once(jax.jit(functools.partial(matmul.matmul, **facts))(x, w, s), exact)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(E4M3, E5M2), (E5M2, E4M3)])
@pytest.mark.parametrize("kind", [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128")])
def test_e5m2_meets_e4m3_on_either_side(kind, x_dtype, w_dtype):
    x, w, s, facts, exact = operands(np.random.default_rng(1), (6, 256, 40), *kind, x_dtype, w_dtype)
    assert_rounded_once(matmul.matmul(x, w, s, **facts), exact)


@pytest.mark.parametrize("out_dtype", [BF16, jnp.float16, F32])
@pytest.mark.parametrize("kind", [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128")])
def test_results_come_in_three_dtypes(kind, out_dtype):
    x, w, s, facts, exact = operands(np.random.default_rng(2), (6, 256, 40), *kind)
    assert_rounded_once(matmul.matmul(x, w, s, **facts, out_dtype=out_dtype), exact, out_dtype)


def after(exact, bias, activation, residual):
    y = exact if bias is None else exact + f64(bias)
    y = y if activation is None else f64(activation(jnp.asarray(y, F32)))
    return y if residual is None else y + f64(residual)


EPILOGUES = [
    # what the library has
    (BF16, None, None),
    (BF16, jax.nn.relu, None),
    (None, GELU, None),
    (None, None, BF16),
    (BF16, None, BF16),
    # what it has not, nor any part of it
    (F32, None, None),
    (BF16, jax.nn.silu, None),
    (None, jax.nn.relu, BF16),
    (F32, GELU, BF16),
]


@pytest.mark.parametrize(("bias", "activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("product", ["fp8 row", "fp8 blocks", "int8", "dense"])
def test_what_follows_a_product_is_rounded_with_it_once(product, bias, activation, residual):
    rng, (m, k, n) = np.random.default_rng(3), (6, 128, 40)
    if product == "dense":
        x, w = (jnp.asarray(rng.normal(size=shape) * 0.1, BF16) for shape in ((m, k), (n, k)))
        f, exact = functools.partial(dense.dense, x, w), f64(x) @ f64(w).T
    else:
        dtype = jnp.int8 if product == "int8" else E4M3
        kind = ("1x128", "128x128") if product == "fp8 blocks" else ("row", "row")
        x, w, s, facts, exact = operands(rng, (m, k, n), *kind, dtype, dtype)
        s, exact = s / np.float32(exact.std()), exact / np.float32(exact.std())
        f = functools.partial(matmul.matmul, x, w, s, **facts)
    b = None if bias is None else jnp.asarray(rng.normal(size=n), bias)
    r = None if residual is None else jnp.asarray(rng.normal(size=(m, n)), residual)
    assert_rounded_once(f(bias=b, activation=activation, residual=r), after(exact, b, activation, r))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_sums_are_exact(shape):
    x, w, s, facts, exact = operands(np.random.default_rng(4), shape, "row", "row", jnp.int8, jnp.int8)
    y = matmul.matmul(x, w, s, **facts, out_dtype=F32)
    np.testing.assert_allclose(f64(y), exact, rtol=3e-7)


@pytest.mark.parametrize("w_scale", ["tensor", "row", "128x128"])
@pytest.mark.parametrize("each_row", [False, True])
def test_a_global_scale_multiplies_the_weight(w_scale, each_row):
    rng = np.random.default_rng(5)
    x, w, s, facts, exact = operands(rng, (4, 256, 136), "1x128", w_scale)
    factor = jnp.asarray(rng.uniform(1, 9, (136,) if each_row else ()), F32)
    assert_rounded_once(matmul.matmul(x, w, s, **facts, global_scale=factor), exact * f64(factor))


def test_where_the_gpu_lacks_vectors_of_scales_xla_applies_them():
    x, w, s, facts, exact = operands(np.random.default_rng(6), (5, 256, 64), "row", "row")
    text = jax.jit(functools.partial(matmul.matmul, **facts, cc=89)).lower(x, w, s).as_text()
    assert f"w_mode = {call.SCALAR} " in text
    assert f"x_mode = {call.SCALAR} " in text
    assert_rounded_once(matmul.matmul(x, w, s, **facts, cc=89), exact)


def test_an_fp8_result_has_its_scale_and_says_its_largest_magnitude():
    rng = np.random.default_rng(7)
    x, w, s, facts, exact = operands(rng, (8, 128, 48), "tensor", "tensor")
    exact = np.maximum(exact, 0)
    out_scale = jnp.float32(exact.max() / 448)
    y, amax = matmul.matmul_to_fp8(x, w, s, x_scale=facts["x_scale"], out_scale=out_scale, activation=jax.nn.relu)
    np.testing.assert_allclose(amax, exact.max(), rtol=1e-6)
    np.testing.assert_array_equal(f64(y), f64(jnp.asarray(exact / float(out_scale), F32).astype(E4M3)))


def test_vmap_over_weights_is_one_call_and_launches_once_for_each(fake_cublaslt):
    rng, b, (m, k, n) = np.random.default_rng(8), 3, (5, 128, 40)
    x, w = codes(rng, (b, m, k), E4M3), codes(rng, (b, n, k), E4M3)
    xs, ws = scales(rng, (b, m, 1)), scales(rng, (b, n, 1))
    bias = jnp.asarray(rng.normal(size=(b, n)), BF16)

    def one(x, w, xs, ws, bias):
        return matmul.matmul(x, w, ws, x_scale=xs, group=k, bias=bias)

    exact = np.stack([(f64(x[i]) * f64(xs[i])) @ (f64(w[i]) * f64(ws[i])).T + f64(bias[i]) for i in range(b)])
    before = fake_cublaslt.FakeMatmuls()
    assert_rounded_once(jax.jit(jax.vmap(one))(x, w, xs, ws, bias), exact)
    assert fake_cublaslt.FakeMatmuls() - before == b
    assert jax.jit(jax.vmap(one)).lower(x, w, xs, ws, bias).as_text().count(f"@{library.TARGET}(") == 1


def test_a_batch_of_single_scales_is_aligned_as_the_library_wants_it():
    rng, b, (m, k, n) = np.random.default_rng(17), 3, (5, 128, 40)
    x, w, s = codes(rng, (b, m, k), E4M3), codes(rng, (b, n, k), E4M3), scales(rng, (b, 1, 1))

    def one(x, w, s):
        return matmul.matmul_to_fp8(x, w, s, x_scale=s, out_scale=s * 900)

    y, amax = jax.vmap(one)(x, w, s)
    exact = np.stack([(f64(x[i]) @ f64(w[i]).T) * f64(s[i]) ** 2 for i in range(b)])
    np.testing.assert_allclose(amax, np.abs(exact).max((1, 2)), rtol=1e-6)
    wanted = jnp.asarray(np.clip(exact / (f64(s) * 900), -448, 448), F32).astype(E4M3)
    np.testing.assert_array_equal(f64(y), f64(wanted))


def test_nested_vmap_broadcasts_what_is_not_batched():
    rng, (m, k, n) = np.random.default_rng(9), (4, 256, 136)
    x, w = codes(rng, (2, m, k), E4M3), codes(rng, (3, n, k), E4M3)
    xs, ws = scales(rng, (2, m, 2)), scales(rng, (3, 2, 2))

    def one(x, xs, w, ws):
        return matmul.matmul(x, w, ws, x_scale=xs, group=128, block_n=128)

    both = jax.vmap(jax.vmap(one, (None, None, 0, 0)), (0, 0, None, None))
    exact = np.stack(
        [[(f64(x[i]) * spread(xs[i], m, k)) @ (f64(w[j]) * spread(ws[j], n, k)).T for j in range(3)] for i in range(2)]
    )
    assert_rounded_once(both(x, xs, w, ws), exact)


def test_the_heuristic_is_asked_once_for_a_call_site(fake_cublaslt):
    x, w, s, facts, _ = operands(np.random.default_rng(10), (4, 128, 48), "row", "row")
    f = jax.jit(functools.partial(matmul.matmul, **facts))
    f(x, w, s).block_until_ready()
    before = fake_cublaslt.FakeHeuristics()
    for _ in range(3):
        f(x, w, s).block_until_ready()
    assert fake_cublaslt.FakeHeuristics() == before


@pytest.mark.parametrize(("asked", "runs"), [(0, 0), (2, 2), (3, 2)])  # the stand-in answers with three
def test_a_candidate_is_one_of_the_heuristics_answers_and_the_last_where_there_are_fewer(fake_cublaslt, asked, runs):
    x, w, s, facts, exact = operands(np.random.default_rng(11), (4, 128, 48), "row", "row")
    assert_rounded_once(matmul.matmul(x, w, s, **facts, config={"candidate": asked}), exact)
    assert fake_cublaslt.FakeCandidate() == runs


def test_a_refusal_is_an_error_with_call_status_shapes_and_types():
    o = call.Operands(*(codes(np.random.default_rng(12), (4, 128), E4M3) for _ in range(2)), *(jnp.ones(4),) * 2)
    with pytest.raises(Exception) as raised:
        jax.block_until_ready(call.multiply(call.Call(jnp.dtype(BF16), call.BLOCK_1X128, call.OUTER), o))
    message = str(raised.value)
    assert "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_INVALID_VALUE (7)" in message
    assert "y BF16[4,4] = x F8E4M3FN[4,128] @ w F8E4M3FN[4,128]^T, x_scale F32[4]" in message


@pytest.mark.parametrize("dtype", [BF16, jnp.float16])
@pytest.mark.parametrize("w_dtype", [jnp.int8, E4M3, E5M2])
def test_dense_products_read_codes_of_eight_bits(dtype, w_dtype):
    rng, (m, k, n) = np.random.default_rng(13), (5, 136, 72)
    x, w, s = jnp.asarray(rng.normal(size=(m, k)), dtype), codes(rng, (n, k), w_dtype), scales(rng, (n, 1))
    assert_rounded_once(dense.matmul(x, w, s), f64(x) @ (f64(w) * f64(s)).T, dtype)


@pytest.mark.parametrize("w_dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize("block", [(1, 136), (72, 136), (32, 64)], ids=str)
def test_dense_products_by_the_transpose_round_values_and_the_result(w_dtype, block):
    rng, (m, k, n) = np.random.default_rng(14), (5, 136, 72)
    x, w = jnp.asarray(rng.normal(size=(m, n)), BF16), codes(rng, (n, k), w_dtype)
    s = scales(rng, tuple(-(-size // of) for size, of in zip((n, k), block, strict=True)))
    wide = np.repeat(np.repeat(f64(s), block[0], axis=0)[:n], block[1], axis=1)[:, :k]
    y = dense.matmul(x, w, s, transposed=True, block_n=block[0], group=block[1])
    exact = f64(x) @ (f64(w) * wide)
    rounding = np.linalg.norm(f64(jnp.asarray(exact, BF16)) - exact)
    assert np.linalg.norm(f64(y) - exact) <= 1.6 * rounding  # of values and of the result: sqrt(2) times one


# -------------------------------------------------------------------------------------------------- scales of 32 and 16


def micro_scales(rng, shape, dtype):
    return jnp.asarray(2.0 ** rng.integers(-4, 5, shape), F32).astype(dtype)


def each(scale, group):
    return np.repeat(f64(scale), group, axis=1)


@pytest.mark.parametrize("shape", [(3, 64, 16), (130, 288, 264)], ids=str)
def test_mxfp8_scales_lie_in_the_documented_tiles(shape):
    rng, (m, k, n) = np.random.default_rng(14), shape
    x, w = codes(rng, (m, k), E4M3), codes(rng, (n, k), E4M3)
    xs, ws = (micro_scales(rng, (rows, k // 32), jnp.float8_e8m0fnu) for rows in (m, n))
    exact = (f64(x) * each(xs, 32)) @ (f64(w) * each(ws, 32)).T
    assert_rounded_once(microscaling.matmul(x, w, ws, x_scale=xs), exact)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed_e2m1(rng, n, k):
    """Random codes `[n, k]` and their words, packed by qjax's own packer."""
    from qjax import layouts

    found = rng.integers(0, 16, (n, k))
    padded = np.pad(found, ((0, 0), (0, layouts.padded(k) - k)))
    return found, layouts.pack(jnp.asarray(padded, jnp.uint8), 4)


def test_mxfp4_weights_meet_mxfp8_rows_of_x():
    rng, (m, k, n) = np.random.default_rng(15), (5, 160, 40)
    x, (found, words) = codes(rng, (m, k), E4M3), packed_e2m1(rng, n, k)
    xs, ws = (micro_scales(rng, (rows, k // 32), jnp.float8_e8m0fnu) for rows in (m, n))
    exact = (f64(x) * each(xs, 32)) @ (E2M1[found] * each(ws, 32)).T
    assert_rounded_once(microscaling.matmul(x, words, ws, x_scale=xs), exact)


def test_nvfp4_multiplies_pairs_of_codes_on_both_sides():
    rng, (m, k, n) = np.random.default_rng(16), (5, 160, 40)
    (a, _), (b, words) = packed_e2m1(rng, m, k), packed_e2m1(rng, n, k)
    x = jnp.asarray(a[:, ::2] | a[:, 1::2] << 4, jnp.uint8)
    xs, ws = (micro_scales(rng, (rows, k // 16), E4M3) for rows in (m, n))
    exact = (E2M1[a] * each(xs, 16)) @ (E2M1[b] * each(ws, 16)).T * 0.25
    y = microscaling.matmul(x, words, ws, x_scale=xs, global_scale=jnp.float32(0.25))
    assert_rounded_once(y, exact)
