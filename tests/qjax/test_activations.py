"""Quantization of x: codes and scales against float64, row by row, and what comes back."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.activations import BLOCK_K, Rows, quantize_rows
from qjax.schemes import Activation

GRANULARITIES = ("token", "tensor", "block")
LARGEST = {"int8": 127.0, "e4m3": 448.0}
EVERY = [(form, granularity) for form in LARGEST for granularity in GRANULARITIES]
LENGTHS = (1, 37, 128, 129, 300)  # of K: short of a block, one, and with an odd end
DTYPES = ("float32", "bfloat16", "float16")  # in turn, so that each meets every one of those


def x_of(*shape: int, dtype: str = "float32") -> jax.Array:
    """Normal, each row of a size of its own, with a few large columns."""
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape) * rng.uniform(0.1, 10, (*shape[:-1], 1))
    return jnp.asarray(x * np.where(rng.uniform(size=shape[-1]) < 0.05, 20.0, 1.0), dtype)


def largest_of(x: jax.Array, granularity: str) -> np.ndarray:
    """The magnitude that each element's scale is made from, shaped like x, one slice at a time."""
    magnitude = np.abs(np.asarray(x, np.float64))
    if granularity == "tensor":
        return np.full(x.shape, magnitude.max())
    width = BLOCK_K if granularity == "block" else x.shape[-1]
    found = np.empty(x.shape)
    for start in range(0, x.shape[-1], width):
        found[..., start : start + width] = magnitude[..., start : start + width].max(axis=-1, keepdims=True)
    return found


def steps_of(x: jax.Array, granularity: str, form: str) -> np.ndarray:
    """The scale of each element in float64; 1 where all of its kind are zero."""
    steps = largest_of(x, granularity) / LARGEST[form]
    return np.where(steps == 0, 1, steps)


def spread(scale: jax.Array, k: int) -> np.ndarray:
    """Stored scales, one for each element of K."""
    return np.asarray(scale, np.float64) if scale.shape[-1] == 1 else np.repeat(scale, BLOCK_K, axis=-1)[..., :k]


class DynamicTest(parameterized.TestCase):
    @parameterized.parameters(
        *((*given, k, DTYPES[(i + j) % 3]) for i, given in enumerate(EVERY) for j, k in enumerate(LENGTHS))
    )
    def test_codes_and_scales_are_those_of_float64(self, form, granularity, k, dtype):
        x = x_of(5, k, dtype=dtype)
        rows = quantize_rows(x, Activation(form, granularity), None)
        assert rows.scale.dtype == jnp.float32
        assert rows.scale.shape == (5, -(-k // BLOCK_K) if granularity == "block" else 1)
        steps = steps_of(x, granularity, form)
        np.testing.assert_allclose(np.broadcast_to(spread(rows.scale, k), x.shape), steps, rtol=2.0**-22)
        # The codes that follow from the scale as it is stored: a value half way may go either way in float32.
        exact = np.asarray(x, np.float64) / spread(rows.scale, k)
        codes = np.asarray(rows.values, np.float64)
        if form == "int8":
            assert rows.values.dtype == jnp.int8 and np.abs(codes).max() == 127
            assert np.max(np.abs(codes - exact)) <= 0.5 + 1e-4
        else:
            assert rows.values.dtype == jnp.float8_e4m3fn and np.abs(codes).max() == 448
            near = np.stack([exact * (1 - 1e-6), exact, exact * (1 + 1e-6)]).astype(np.float32)
            nearest = near.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
            assert np.all(np.any(nearest == codes, axis=0))

    @parameterized.parameters(*EVERY)
    def test_what_comes_back_is_within_half_a_step(self, form, granularity):
        x = x_of(4, 300)
        back = np.asarray(quantize_rows(x, Activation(form, granularity), None).dequantize(), np.float64)
        steps = steps_of(x, granularity, form)
        # e4m3 has three bits of mantissa: half a unit of the last one is 1/16, or 2^-10 below its normal numbers.
        half = 0.5 * steps if form == "int8" else np.maximum(np.abs(np.asarray(x)) / 16, 2.0**-10 * steps)
        assert np.all(np.abs(back - np.asarray(x)) <= half * (1 + 1e-4))

    @parameterized.parameters(*EVERY)
    def test_zeros_have_a_scale_of_one_and_stay_zeros(self, form, granularity):
        rows = quantize_rows(jnp.zeros((3, 200)), Activation(form, granularity), None)
        np.testing.assert_array_equal(rows.scale, np.ones(rows.scale.shape))
        np.testing.assert_array_equal(rows.dequantize(), np.zeros((3, 200)))

    @parameterized.parameters("int8", "e4m3")
    def test_a_row_or_a_block_of_zeros_is_alone_in_that(self, form):
        x = x_of(3, 256).at[1].set(0).at[2, 128:].set(0)
        by_token = quantize_rows(x, Activation(form, "token"), None)
        by_block = quantize_rows(x, Activation(form, "block"), None)
        np.testing.assert_array_equal(np.asarray(by_token.scale == 1)[:, 0], [False, True, False])
        np.testing.assert_array_equal(by_block.scale == 1, [[False, False], [True, True], [False, True]])
        assert np.all(np.isfinite(by_block.dequantize()))

    def test_a_token_is_quantized_without_the_others_and_a_tensor_is_not(self):
        x = x_of(2, 64)
        louder = x.at[1].multiply(100)
        for granularity, alone in (("token", True), ("block", True), ("tensor", False)):
            before, after = (quantize_rows(a, Activation("int8", granularity), None) for a in (x, louder))
            assert bool(jnp.array_equal(before.values[0], after.values[0])) is alone, granularity

    @parameterized.parameters(*EVERY)
    def test_no_rows_and_leading_axes(self, form, granularity):
        activation = Activation(form, granularity)
        none = quantize_rows(jnp.zeros((2, 0, 200)), activation, None)
        assert none.values.shape == none.dequantize().shape == (2, 0, 200)
        x = x_of(2, 3, 200)
        rows = quantize_rows(x, activation, None)
        flat = quantize_rows(x.reshape(6, 200), activation, None)
        chex.assert_trees_all_equal(jax.tree.map(lambda a: a.reshape(6, -1), rows), flat)

    def test_a_short_last_block_is_of_its_own_elements_alone(self):
        x = jnp.concatenate([jnp.full((1, 128), 64.0), jnp.full((1, 3), 0.5)], axis=1)
        rows = quantize_rows(x, Activation("int8", "block"), None)
        np.testing.assert_allclose(rows.scale, [[64 / 127, 0.5 / 127]], rtol=1e-6)
        np.testing.assert_array_equal(rows.values, np.full((1, 131), 127))

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 260), st.sampled_from(EVERY), st.integers(-30, 30))
    def test_a_power_of_two_moves_to_the_scale(self, m, k, given, exponent):
        activation = Activation(*given)
        x = x_of(m, k)
        rows = quantize_rows(x, activation, None)
        scaled = quantize_rows(x * 2.0**exponent, activation, None)
        chex.assert_trees_all_equal(scaled, Rows(rows.values, rows.scale * 2.0**exponent))

    @parameterized.parameters(*EVERY)
    def test_it_can_be_traced(self, form, granularity):
        x = x_of(3, 200)
        eager = quantize_rows(x, Activation(form, granularity), None)
        traced = jax.jit(lambda x: quantize_rows(x, Activation(form, granularity), None).dequantize())(x)
        np.testing.assert_allclose(traced, eager.dequantize(), rtol=2.0**-3)
        assert np.mean(np.isclose(traced, eager.dequantize(), rtol=1e-6)) > 0.99  # a tie may go either way


class StaticTest(parameterized.TestCase):
    @parameterized.parameters("int8", "e4m3")
    def test_the_scale_is_the_one_given_and_what_it_cannot_hold_saturates(self, form):
        top = LARGEST[form]
        x = jnp.array([[0.5, -0.25, 3 * top], [-3 * top, 0.0, 1.0]])
        rows = quantize_rows(x, Activation(form, "tensor", "static"), jnp.float32(0.25))
        np.testing.assert_array_equal(rows.scale, np.full((2, 1), 0.25, np.float32))
        low = -128.0 if form == "int8" else -448.0
        np.testing.assert_array_equal(rows.values.astype(jnp.float32), [[2, -1, top], [low, 0, 4]])

    def test_layers_of_a_stack_have_scales_of_their_own(self):
        x = jnp.ones((2, 3, 5))
        scale = jnp.array([0.5, 0.25]).reshape(2, 1, 1)
        rows = quantize_rows(x, Activation("int8", "tensor", "static"), scale)
        assert rows.scale.shape == (2, 3, 1)
        np.testing.assert_array_equal(rows.values[:, 0, 0], [2, 4])
        np.testing.assert_array_equal(rows.dequantize(), x)

    def test_a_static_scale_that_is_missing_is_our_own_bug(self):
        with pytest.raises(AssertionError, match="checked in qjax.matmul"):
            quantize_rows(jnp.ones((1, 2)), Activation("int8", "tensor", "static"), None)


def test_without_an_activation_x_is_left_alone():
    x = x_of(2, 8, dtype="bfloat16")
    rows = quantize_rows(x, None, None)
    assert rows.values is x and rows.scale is None
    np.testing.assert_array_equal(rows.dequantize(), x.astype(jnp.float32))
