"""Quantization to nearest against its formulas, written once more in numpy, and its promises on any weight.

Every division is rounded once, as in numpy, so that codes and scales are compared exactly, ties included.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from cases import WEIGHT_ONLY
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.dequantize import block_scales, codes
from qjax.errors import QuantizeError
from qjax.formats import FORMATS
from qjax.qtensor import QTensor, validate_qtensor
from qjax.quantize import quantize_array
from qjax.schemes import parse_scheme

SHAPE = (256, 6)  # of most weights here: a shape is compiled once for each scheme
FEW = settings(max_examples=4, deadline=None, derandomize=True, database=None)
F32 = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = np.array(
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0, 0.0795803,
     0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = np.concatenate([FP4, 0 - FP4])
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


# What an array is cut into. Everything here is `[N, K]`, in float32 unless it says otherwise.


def over_blocks(reduce, w, block):
    """`reduce` of each block, one by one: `[R, C]`; short ones at the edges count what they have."""
    n, k = w.shape
    bn, bk = block[0] or n, block[1] or k
    return np.array([[reduce(w[i : i + bn, j : j + bk]) for j in range(0, k, bk)] for i in range(0, n, bn)], w.dtype)


def spread(values, w, block):
    """`[R, C]` -> `[N, K]`: to each weight its block's value."""
    rows = np.arange(w.shape[0]) // (block[0] or w.shape[0])
    columns = np.arange(w.shape[1]) // (block[1] or w.shape[1])
    return values[rows][:, columns]


def nearest_entry(table, ratio, prefer):
    """Codes of the entries nearest to float32 ratios, in float64; `prefer` ranks those equally near."""
    table = table.astype(F32).astype(np.float64)
    ranked = np.array(sorted(range(len(table)), key=lambda c: (prefer(table[c], c), c)))
    distance = np.abs(ratio.astype(np.float64)[..., None] - table[ranked])
    return ranked[np.argmin(distance, axis=-1)]  # of equals the first, which is the preferred one


def e2m1(ratio):
    return nearest_entry(E2M1, np.clip(ratio, -6, 6), lambda _, code: code % 2)


def float8(form, ratio):
    dtype = FLOAT8[form]
    top = F32(ml_dtypes.finfo(dtype).max)
    return np.clip(ratio, -top, top).astype(dtype)


# The formulas: `[N, K]` -> codes as they are stored, and the scales that the codes were made with.


def sym(w, bits, block, scale_dtype):
    top = F32(2 ** (bits - 1) - 1)
    s = over_blocks(np.max, np.abs(w), block) / top
    s = np.where(s == 0, F32(1), s).astype(scale_dtype)
    q = np.clip(np.rint(w / spread(s.astype(F32), w, block)), -top - 1, top)
    return (q + (0 if bits == 8 else 2 ** (bits - 1))).astype(int), s


def asym(w, bits, block, scale_dtype):
    top = F32(2**bits - 1)
    low = over_blocks(np.min, np.minimum(w, 0), block)
    high = over_blocks(np.max, np.maximum(w, 0), block)
    s = (high - low) / top
    s = np.where(s == 0, F32(1), s).astype(scale_dtype)
    z = np.clip(np.rint(-low / s.astype(F32)), 0, top)
    q = np.clip(np.rint(w / spread(s.astype(F32), w, block)) + spread(z, w, block), 0, top)
    shift = 128 if bits == 8 else 0
    return (q - shift).astype(int), s, (z - shift).astype(int)


def fp8(w, form, block):
    s = over_blocks(np.max, np.abs(w), block) / F32(ml_dtypes.finfo(FLOAT8[form]).max)
    s = np.where(s == 0, F32(1), s)
    return float8(form, w / spread(s, w, block)), s


def table(w, name, block):
    a = over_blocks(np.max, np.abs(w), block)
    a = np.where(a == 0, F32(1), a)
    ratio = w / spread(a, w, block)
    if name == "nf4":
        return nearest_entry(NF4, ratio, lambda value, _: value), a
    return nearest_entry(FP4, ratio, lambda value, _: -abs(value)), a


def mx(w, form, block):
    emax = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[form]
    amax = over_blocks(np.max, np.abs(w), block)
    exponent = np.floor(np.log2(np.where(amax == 0, 1, amax).astype(np.float64))) - emax
    s = np.where(amax == 0, 2.0**-127, 2.0**exponent)
    ratio = (w / spread(s, w, block)).astype(F32)  # exact: s is a power of two
    return (e2m1(ratio) if form == "e2m1" else float8(form, ratio)), s


def nvfp4(w):
    g = np.max(np.abs(w)) / F32(448 * 6) or F32(1)
    sb = float8("e4m3", over_blocks(np.max, np.abs(w), (1, 16)) / F32(6) / g)
    step = spread(sb.astype(F32), w, (1, 16)) * g
    ratio = np.divide(w, step, out=np.zeros_like(w), where=step != 0)
    return e2m1(ratio), sb, g


# Weights to try them on.


def kernel(k, n, seed=0, dtype=np.float32):
    """`[K, N]` of the spread of trained weights, bfloat16 values (ratios fall on ties often), some exact zeros."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((k, n)) * 10.0 ** rng.uniform(-2, 0, (1, n)) * 0.05
    w[rng.uniform(size=w.shape) < 0.02] = 0
    return w.astype(ml_dtypes.bfloat16).astype(dtype)


@st.composite
def kernels(draw, blocks=(16, 64), groups=(1, 3), short=False):
    """(`[K, N]`, block_k): whole groups, or with a short last one; one value may stand out, one group be zero.

    Few shapes: each is compiled for each scheme.
    """
    block = draw(st.sampled_from(blocks))
    k = block * draw(st.sampled_from(groups)) + (block // 2 + 1 if short else 0)
    w = kernel(k, draw(st.sampled_from([1, 5])), draw(st.integers(0, 1000)))
    w *= F32(10.0 ** draw(st.integers(-1, 3)))
    if draw(st.booleans()):
        w[draw(st.integers(0, k - 1)), 0] *= 50
    if draw(st.booleans()):
        w[:block, -1] = 0
    return w, block


def stored(q):
    """Codes of a QTensor, `[N, K]`, and its scales, both in numpy."""
    return np.asarray(codes(q)), np.asarray(q.scale if not isinstance(q.scale, QTensor) else block_scales(q))


def same_floats(got, want):
    """Float8 codes by value: what matters is not the sign of a zero."""
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


class FormulaTest(parameterized.TestCase):
    @parameterized.product(bits=(2, 3, 4, 5, 6, 8), symmetric=(True, False), size=("group", "channel", "tensor"))
    @settings(max_examples=2, deadline=None, derandomize=True, database=None)
    @given(kernels())
    def test_integers(self, bits, symmetric, size, drawn):
        w, group = drawn[0].T, drawn[1] if size == "group" else size
        q = quantize_array(drawn[0], f"w{bits}a16:group_size={group},symmetric={symmetric}")
        got, scale = stored(q)
        want = (sym if symmetric else asym)(w, bits, q.scheme.block, scale.dtype)
        np.testing.assert_array_equal(scale, want[1])
        np.testing.assert_array_equal(got, want[0])
        assert (q.zero_point is None) == symmetric
        if not symmetric:
            np.testing.assert_array_equal(np.asarray(q.zero_point), want[2])

    @parameterized.parameters("w8a16", "w4a16:group_size=-1", "w8a16:group_size=tensor", "w3a16:symmetric=true")
    def test_a_weight_half_way_between_two_codes_goes_to_the_even_one(self, text):
        form = parse_scheme(text).format
        w = (np.random.default_rng(0).integers(-form.maximum, form.maximum, (256, 64)) + 0.5).astype(F32)
        w[::128] = form.maximum  # the scale is 1
        w *= F32(2.0**-7)
        got = np.asarray(codes(quantize_array(w, text))).astype(int) - form.zero
        np.testing.assert_array_equal(got, np.rint(w.T * 2.0**7))
        assert np.sum(got % 2 == 0) > 0.98 * got.size

    @parameterized.parameters("nf4", "fp4")
    @FEW
    @given(kernels())
    def test_tables(self, name, drawn):
        w, block = drawn
        got, scale = stored(quantize_array(w, f"{name}:block_size={block}"))
        want, a = table(w.T, name, (1, block))
        np.testing.assert_array_equal(scale, a)
        np.testing.assert_array_equal(got, want)

    @parameterized.parameters(("mxfp4", "e2m1"), ("mxfp8", "e4m3"), ("mxfp8:format=e5m2", "e5m2"))
    @FEW
    @given(kernels(blocks=(32,)))
    def test_mx(self, text, form, drawn):
        w, _ = drawn
        got, scale = stored(quantize_array(w, text))
        want, s = mx(w.T, form, (1, 32))
        np.testing.assert_array_equal(scale.astype(np.float64), s)
        if form == "e2m1":
            np.testing.assert_array_equal(E2M1[got], E2M1[want])
        else:
            same_floats(got, want)

    @parameterized.parameters(
        (1.0, -2), (0.999, -3), (2.0**-20, -22), (1.9999999, -2), (448.0, 6), (3e-30, -101), (0.0, -127),
    )  # fmt: skip
    def test_an_mx_scale_is_the_binade_of_the_maximum(self, amax, exponent):
        w = np.zeros((32, 1), np.float32)
        w[5] = amax
        assert np.asarray(quantize_array(w, "mxfp4").scale).astype(np.float64) == 2.0**exponent

    @parameterized.product(form=("e4m3", "e5m2"), unit=("tensor", "channel", "block"))
    @FEW
    @given(kernels(blocks=(128,), short=True))
    def test_fp8_with_blocks_short_at_the_edges(self, form, unit, drawn):
        q = quantize_array(drawn[0], f"fp8:format={form},granularity={unit}")
        got, scale = stored(q)
        want, s = fp8(drawn[0].T, form, q.scheme.block)
        np.testing.assert_array_equal(scale, s)
        same_floats(got, want)

    @FEW
    @given(kernels(blocks=(16,)))
    def test_nvfp4(self, drawn):
        q = quantize_array(drawn[0], "nvfp4")
        got, scale = stored(q)
        want, sb, g = nvfp4(drawn[0].T)
        assert np.asarray(q.global_scale) == (g or 1)
        same_floats(scale, sb)
        np.testing.assert_array_equal(E2M1[got], E2M1[want])

    @FEW
    @given(kernels(blocks=(16, 64)))
    def test_double_quantized_scales(self, drawn):
        w, block = drawn
        q = quantize_array(w, f"nf4:block_size={block},double_quant=true")
        plain = quantize_array(w, f"nf4:block_size={block}")
        np.testing.assert_array_equal(np.asarray(codes(q)), np.asarray(codes(plain)))  # made with the exact scales
        a = np.asarray(plain.scale)
        nested = q.scale
        # The mean of R*C float32 in any order: R*C - 1 additions and a division.
        assert abs(float(nested.offset) - a.astype(np.float64).mean()) <= a.size * 2.0**-24 * a.mean()
        r = a - np.asarray(nested.offset)
        rows, columns = 256 // a.shape[1], a.shape[1]
        a2 = over_blocks(np.max, np.abs(r), (rows, columns))
        a2 = np.where(a2 == 0, F32(1), a2)
        np.testing.assert_array_equal(np.asarray(nested.scale), a2)
        dynamic = np.array(FORMATS["dynamic8"].codebook, F32)
        want = nearest_entry(dynamic, r / spread(a2, r, (rows, columns)), lambda value, _: value)
        np.testing.assert_array_equal(np.asarray(nested.packed), want)
        again = dynamic[want] * spread(a2, r, (rows, columns)) + np.asarray(nested.offset)
        np.testing.assert_allclose(np.asarray(block_scales(q)), again, rtol=2e-7)


def local_step(q, w):
    """The gap between neighbouring values at each ratio w / scale, in units of the scale, and the largest value."""
    form = q.scheme.format
    scale = np.asarray(block_scales(q), np.float64)
    if q.global_scale is not None:
        scale = scale * float(q.global_scale)
    s = spread(scale, w, q.scheme.block)
    v = np.abs(np.divide(w, s, out=np.zeros(w.shape), where=s != 0))
    if form.kind == "int":
        return s, np.ones_like(v), np.inf
    if form.kind == "float":
        mantissa, low = (3, -6) if form.name == "e4m3" else (2, -14)
        return s, 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(v, 1e-30))), low) - mantissa), form.maximum
    values = np.unique(np.array(form.codebook, F32).astype(np.float64))
    signed = np.divide(w, s, out=np.zeros(w.shape), where=s != 0)
    upper = np.clip(np.searchsorted(values, signed), 1, len(values) - 1)
    return s, values[upper] - values[upper - 1], form.maximum


class RoundTripTest(parameterized.TestCase):
    @parameterized.parameters(*(s for s in WEIGHT_ONLY if "double" not in s))
    @FEW
    @given(st.integers(0, 1000), st.integers(-4, 4), st.booleans())
    def test_a_weight_comes_back_within_half_the_local_step(self, text, seed, magnitude, one_sided):
        given_ = kernel(*SHAPE, seed) * F32(10.0**magnitude)
        q = quantize_array(np.abs(given_) if one_sided else given_, text)
        w = (np.abs(given_) if one_sided else given_).T.astype(np.float64)
        again = np.asarray(q.dequantize(), np.float64).T
        s, step, top = local_step(q, w)
        saturated = np.maximum(np.abs(w) - top * s, 0)
        slack = np.maximum(np.abs(w), s) * 2.0**-21  # float32 roundings of ratio and product
        if not q.scheme.symmetric:
            # Steps of a rounded scale miss the end of the range by that rounding of each of the 2^bits - 1.
            kind = np.asarray(q.scale).dtype.name
            slack += s * 2**q.scheme.bits * {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-22}[kind]
        assert np.all(np.abs(again - w) <= s * step / 2 + saturated + slack + np.where(s == 0, np.abs(w), 0))

    @parameterized.parameters(*(s for s in WEIGHT_ONLY if "double" not in s and s != "nvfp4"))
    @FEW
    @given(st.integers(0, 1000), st.integers(-3, 3))
    def test_quantizing_what_was_quantized_changes_nothing(self, text, seed, magnitude):
        q = quantize_array(kernel(*SHAPE, seed) * F32(10.0**magnitude), text)
        again = quantize_array(q.dequantize(), text)
        first, second = (np.asarray(codes(t)).astype(np.float32) for t in (q, again))
        if q.scheme.symmetric:
            np.testing.assert_array_equal(first, second)
        else:
            assert np.max(np.abs(first - second)) <= 1

    def test_an_nvfp4_block_whose_scale_rounds_to_zero_has_all_codes_zero(self):
        w = np.clip(kernel(64, 4), -0.99, 0.99)
        w[0] = 1
        # The smallest e4m3 is 2^-9, and half of it rounds to 0: a block below 2^-10 * 6 * g, g = 1 / 2688.
        w[16:32] = np.linspace(-1, 1, 64).reshape(16, 4) * 0.99 * 2.0**-10 * 6 / 2688
        w[48:] = 0
        q = quantize_array(w, "nvfp4")
        scale, got = np.asarray(q.scale, np.float32), np.asarray(codes(q))
        assert not scale[:, [1, 3]].any() and scale[:, 0].all() and w[16:32].all()
        assert not got[:, 16:32].any() and not got[:, 48:].any() and got[:, :16].any()
        assert not np.asarray(q.dequantize())[16:32].any()


class EdgeTest(parameterized.TestCase):
    @parameterized.parameters(*WEIGHT_ONLY)
    def test_a_block_of_zeros_comes_back_as_zeros_and_leaves_others_alone(self, text):
        w = kernel(*SHAPE)
        w[:128] = 0
        again = np.asarray(quantize_array(w, text).dequantize())
        assert np.all(again[:128] == 0) or "double" in text
        assert np.all(np.isfinite(again)) and np.any(again[128:])

    @parameterized.parameters(*WEIGHT_ONLY)
    def test_a_weight_of_zeros_comes_back_as_zeros(self, text):
        q = quantize_array(np.zeros(SHAPE, np.float32), text)
        np.testing.assert_array_equal(np.asarray(q.dequantize()), np.zeros(SHAPE))
        assert np.all(np.isfinite(np.asarray(block_scales(q))))

    @parameterized.parameters("mxfp4", "mxfp8", "mxfp8:format=e5m2")
    def test_zeros_in_mx_blocks_have_code_zero(self, text):
        # Their scale is 2^-127, which is subnormal: XLA may take it for 0, and 0 / 0 has no code.
        w = np.zeros(SHAPE, np.float32)
        w[40] = 1
        got = np.asarray(codes(quantize_array(w, text))).astype(np.float32)
        assert not got[:, :32].any() and np.count_nonzero(got) == SHAPE[1]

    @parameterized.parameters(*WEIGHT_ONLY)
    def test_subnormal_weights_are_near_zero_and_finite(self, text):
        w = np.full(SHAPE, 1e-39, np.float32)
        w[::2] *= -1
        again = np.asarray(quantize_array(w, text).dequantize())
        # XLA flushes subnormals on a CPU; a scale is normal, so that they may also round to a few of 2^-126.
        assert np.all(np.abs(again) <= 2.0**-123)

    @parameterized.parameters(*WEIGHT_ONLY)
    def test_huge_weights_stay_finite(self, text):
        w = kernel(*SHAPE)
        w *= F32(1e36) / np.abs(w).max()
        again = np.asarray(quantize_array(w, text).dequantize(), np.float64)
        assert np.linalg.norm(again - w) < np.linalg.norm(np.float64(w))

    @parameterized.parameters(1e-6, 1e9)
    def test_scales_that_float16_cannot_hold_are_float32(self, magnitude):
        w = kernel(128, 4) * F32(magnitude)
        q = quantize_array(w, "w4a16:group_size=32")
        assert q.scale.dtype == jnp.float32
        want, s = sym(w.T, 4, (1, 32), F32)
        np.testing.assert_array_equal(np.asarray(q.scale), s)
        np.testing.assert_array_equal(np.asarray(codes(q)), want)
        assert quantize_array(kernel(128, 4), "w4a16:group_size=32").scale.dtype == jnp.float16

    def test_one_tiny_group_is_enough_for_float32_and_a_group_of_zeros_is_not(self):
        w = kernel(128, 4)
        w[:32] = 0
        assert quantize_array(w, "w4a16:group_size=32").scale.dtype == jnp.float16
        w[:32] = 1e-6
        assert quantize_array(w, "w4a16:group_size=32").scale.dtype == jnp.float32

    def test_under_a_trace_a_float16_scale_stays_and_is_clamped(self):
        quantize = jax.jit(lambda w: quantize_array(w, "w4a16:group_size=32"))
        w = kernel(128, 4)
        chex.assert_trees_all_equal(quantize(w), quantize_array(w, "w4a16:group_size=32"))
        tiny = quantize(w * F32(1e-6))
        assert tiny.scale.dtype == jnp.float16
        assert np.all(np.asarray(tiny.scale, F32) >= 2.0**-14)
        huge = quantize(w * F32(1e9))
        assert np.all(np.isfinite(np.asarray(huge.scale, F32)))

    @parameterized.parameters("w4a16:group_size=64", "nf4", "mxfp4", "nvfp4", "w3a16:group_size=32")
    def test_a_short_last_group_is_quantized_on_its_own(self, text):
        w = kernel(200, 5)
        q = quantize_array(w, text, partial_groups=True)
        assert q.shape == (200, 5)
        block = q.scheme.block[1]
        assert block_scales(q).shape == (5, -(-200 // block))
        if q.global_scale is None:  # then whole groups do not know of the short one, nor it of them
            whole = 200 // block * block
            head = quantize_array(w[:whole], text)
            tail = quantize_array(w[whole:], text, partial_groups=True)
            again = np.concatenate([np.asarray(t.dequantize()) for t in (head, tail)])
            np.testing.assert_array_equal(np.asarray(q.dequantize()), again)


class PieceTest(parameterized.TestCase):
    @parameterized.parameters("w4a16:group_size=32", "w3a16:group_size=32", "nf4:block_size=32", "mxfp4", "fp8")
    def test_pieces_are_padded_on_their_own_and_mean_the_same(self, text):
        w = kernel(384, 6)
        whole, pieces = quantize_array(w, text), quantize_array(w, text, k_pieces=4)
        assert pieces.shape == whole.shape == (384, 6)
        np.testing.assert_array_equal(np.asarray(pieces.dequantize()), np.asarray(whole.dequantize()))
        if whole.is_packed:
            assert pieces.k_piece == (96, 128) and pieces.packed.shape[-2] == 4
            assert whole.k_piece == (128, 128) and whole.packed.shape[-2] == 3

    @parameterized.parameters("w4a16:group_size=32", "w5a16:group_size=32", "mxfp4")
    def test_a_slice_of_pieces_is_the_tensor_of_that_slice_of_k(self, text):
        w = kernel(384, 6)
        q = quantize_array(w, text, k_pieces=4)
        for i in range(4):
            part = dataclasses.replace(q, packed=q.packed[:, i : i + 1], scale=q.scale[:, 3 * i : 3 * i + 3])
            assert validate_qtensor(part).shape == (96, 6)
            alone = quantize_array(w[96 * i : 96 * i + 96], text)
            np.testing.assert_array_equal(np.asarray(part.dequantize()), np.asarray(alone.dequantize()))

    def test_pieces_of_whole_blocks_need_no_padding_of_their_own(self):
        assert quantize_array(kernel(512, 2), "w4a16", k_pieces=4).k_piece == (128, 128)


class ShapeTest(parameterized.TestCase):
    @parameterized.parameters(*WEIGHT_ONLY[::3], "nf4:double_quant=true", "nvfp4", "w8a16:group_size=tensor")
    def test_stacked_kernels_are_quantized_one_by_one(self, text):
        w = np.stack([kernel(*SHAPE, seed) * F32(10 + seed) for seed in range(3)])
        stack = quantize_array(w, text)
        assert validate_qtensor(stack).shape == (3, 256, 6)
        for i in range(3):
            one = quantize_array(w[i], text)
            chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(lambda a, i=i: a[i], stack), one)
            np.testing.assert_array_equal(np.asarray(codes(stack))[i], np.asarray(codes(one)))
            np.testing.assert_allclose(np.asarray(stack.dequantize())[i], np.asarray(one.dequantize()), rtol=1e-6)

    @parameterized.parameters("bfloat16", "float16", "float32")
    def test_a_weight_keeps_its_dtype_and_is_quantized_in_float32(self, dtype):
        w = jnp.asarray(kernel(128, 6)).astype(dtype)
        q = quantize_array(w, "w4a16:group_size=32")
        assert q.dtype == w.dtype and q.dequantize().dtype == w.dtype
        wide = quantize_array(w.astype(jnp.float32), "w4a16:group_size=32")
        np.testing.assert_array_equal(np.asarray(q.packed), np.asarray(wide.packed))
        assert quantize_array(w, "w4a16", dtype="float16").dtype == np.float16

    def test_it_stays_on_its_device(self):
        device = jax.devices()[-1]
        q = quantize_array(jax.device_put(kernel(128, 4), device), "w4a16")
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(q))

    def test_it_has_shapes_without_values(self):
        w = jax.ShapeDtypeStruct((3, 256, 6), jnp.bfloat16)
        q = jax.eval_shape(lambda w: quantize_array(w, "w4a16:symmetric=false"), w)
        assert q.shape == (3, 256, 6) and q.dtype == jnp.bfloat16
        assert q.nbytes == 3 * (256 * 6 // 2 + 2 * 6 * 2 + 2 * 6)


class ErrorTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            (100, 4),
            "w4a16",
            {},
            r"up: group_size=128 does not divide K=100; these do: -1 \(per channel\); or partial_groups",
        ),
        ((7392, 4), "w4a16", {}, r"group_size=128 does not divide K=7392; these do: 16, 32, -1"),
        ((4304, 4), "mxfp4", {}, r"group_size=32 does not divide K=4304; these do: 16, -1"),
        ((2880, 4), "nf4:block_size=128", {}, r"these do: 16, 32, 64, -1"),
        ((128,), "w4a16", {}, r"up: shape \(128,\) is no kernel"),
        ((), "w4a16", {}, r"is no kernel"),
        ((0, 4), "w4a16", {}, r"shape \(0, 4\) is no kernel"),
        ((128, 0), "fp8", {}, r"shape \(128, 0\) is no kernel"),
        ((128, 4), "w4a16", {"k_pieces": 3}, r"K=128 cannot be cut into k_pieces=3"),
        ((128, 4), "w4a16:group_size=64", {"k_pieces": 4}, r"a piece of K=32 cuts groups of 64 \(k_pieces=4\)"),
        ((128, 4), "w4a16", {"k_pieces": 0}, r"k_pieces=0"),
    )
    def test_a_shape_that_cannot_be_quantized_is_named(self, shape, text, options, message):
        with pytest.raises(QuantizeError, match=message):
            quantize_array(np.zeros(shape, np.float32), text, where="up", **options)

    @parameterized.parameters("int32", "int8", "uint8", "bool", "complex64", "float8_e4m3fn")
    def test_a_dtype_that_is_no_wide_float_is_named(self, dtype):
        with pytest.raises(QuantizeError, match=rf"up: dtype {dtype} cannot be quantized; allowed: float16"):
            quantize_array(jnp.zeros((128, 4), dtype), "w4a16", where="up")

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_weights_that_are_not_finite_are_counted_and_named(self, bad):
        w = kernel(128, 4)
        w[3, 1] = w[100, 2] = bad
        with pytest.raises(QuantizeError, match=r"layers.3.up: 2 of 512 weights are NaN or inf"):
            quantize_array(w, "w4a16", where="layers.3.up")

    def test_an_unknown_scheme_is_an_error_of_the_same_family(self):
        with pytest.raises(ValueError, match="unknown scheme 'int4'"):
            quantize_array(kernel(128, 4), "int4")
