"""Quantization to nearest against its formulas, written once more in NumPy: codes, scales, and what comes back."""

import numpy as np
from absl.testing import parameterized
from cases import WEIGHT_ONLY
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import (
    E2M1,
    F32,
    SHAPE,
    asym,
    fp8,
    kernel,
    mx,
    nearest_entry,
    nvfp4,
    over_blocks,
    spread,
    sym,
    table,
)

from qjax.dequantize import block_scales, codes
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array
from qjax.schemes import parse_scheme

FEW = settings(max_examples=4, deadline=None, derandomize=True, database=None)


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

    @parameterized.parameters(*range(10))
    def test_the_mean_that_double_quantization_keeps_is_the_one_it_subtracted(self, seed):
        # A mean that is fused into its readers is summed by each in an order of its own: the two differ in a last bit.
        spread_of_columns = np.array([0.003, 0.015, 0.03, 0.001, 0.002])
        w = (np.random.default_rng(seed).normal(size=(64, 5)) * spread_of_columns).astype(F32)
        nested = quantize_array(w, "nf4:block_size=64,double_quant=true").scale
        plain = np.asarray(quantize_array(w, "nf4:block_size=64").scale)
        assert nested.scale[0, 0] == np.max(np.abs(plain - np.asarray(nested.offset)))


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
