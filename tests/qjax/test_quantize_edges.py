"""What quantization promises of any weight: zeros, extremes, short groups, pieces, stacks; and what it refuses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import WEIGHT_ONLY
from nearest import F32, SHAPE, kernel, sym

from qjax.dequantize import block_scales, codes
from qjax.errors import QuantizeError
from qjax.qtensor import validate_qtensor
from qjax.quantize import quantize_array


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
