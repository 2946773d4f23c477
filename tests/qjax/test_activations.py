"""Quantization of x against its formulas in numpy: codes, scales, and the edges of each granularity."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.activations import Rows, quantize_rows
from qjax.schemes import Activation

F32 = np.float32
TOP = {"int8": F32(127), "e4m3": F32(448)}


def amax_over(x: np.ndarray, granularity: str) -> np.ndarray:
    """`[..., C]`: the largest magnitude that each scale covers."""
    if granularity == "tensor":
        return np.full((*x.shape[:-1], 1), np.abs(x).max(initial=0), F32)
    cuts = range(0, x.shape[-1], 128) if granularity == "block" else [0]
    width = 128 if granularity == "block" else x.shape[-1]
    return np.stack([np.abs(x[..., c : c + width]).max(-1) for c in cuts], axis=-1)


def spread(scale: np.ndarray, k: int) -> np.ndarray:
    return scale if scale.shape[-1] == 1 else np.repeat(scale, 128, axis=-1)[..., :k]


def encoded(ratio: np.ndarray, form: str) -> np.ndarray:
    if form == "int8":
        return np.clip(np.rint(ratio), -128, 127).astype(np.int8)
    return np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def sample(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.where(rng.uniform(size=shape[-1]) < 0.05, 20.0, 1.0)
    return jnp.asarray(x, dtype)


class QuantizeRowsTest(parameterized.TestCase):
    @parameterized.product(
        form=("int8", "e4m3"), granularity=("token", "tensor", "block"), dtype=("float32", "bfloat16")
    )
    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from([(3, 256), (2, 2, 300), (1, 64)]), st.integers(0, 99))
    def test_codes_follow_the_formula(self, form, granularity, dtype, shape, seed):
        x = sample(*shape, seed=seed, dtype=dtype)
        rows = quantize_rows(x, Activation(form, granularity), None)
        wide = np.asarray(x, F32)
        want = amax_over(wide, granularity) / TOP[form]
        scale = np.asarray(rows.scale)
        assert scale.shape == want.shape and np.all(np.abs(scale - want) <= np.spacing(want))
        # Given the scale, codes are those of the quotient.
        ratio = wide / spread(scale, shape[-1])
        got = np.asarray(rows.values)
        np.testing.assert_array_equal(got.astype(F32), encoded(ratio, form).astype(F32))
        assert got.dtype == (np.int8 if form == "int8" else ml_dtypes.float8_e4m3fn)
        again = got.astype(F32) * spread(scale, shape[-1])
        np.testing.assert_array_equal(np.asarray(rows.dequantize()), again)

    @parameterized.parameters("int8", "e4m3")
    def test_a_static_scale_is_taken_as_it_is_and_x_beyond_it_saturates(self, form):
        x, scale = sample(4, 256), jnp.float32(0.01)
        rows = quantize_rows(x, Activation(form, "tensor", "static"), scale)
        ratio = np.asarray(x) / F32(0.01)
        top = {"int8": (-128, 127), "e4m3": (-448, 448)}[form]
        assert np.any(np.abs(ratio) > 448)
        got = np.asarray(rows.values).astype(F32)
        np.testing.assert_array_equal(got, encoded(ratio, form).astype(F32))
        assert (got.min(), got.max()) == top
        assert rows.scale.shape == (4, 1)

    @parameterized.product(form=("int8", "e4m3"), granularity=("token", "tensor", "block"))
    def test_zeros_have_scale_one_and_stay_zeros(self, form, granularity):
        rows = quantize_rows(jnp.zeros((2, 200)), Activation(form, granularity), None)
        assert np.all(np.asarray(rows.scale) == 1) and not np.asarray(rows.dequantize()).any()

    @parameterized.product(form=("int8", "e4m3"), granularity=("token", "tensor", "block"))
    def test_no_rows_are_quantized_too(self, form, granularity):
        rows = quantize_rows(jnp.zeros((0, 200)), Activation(form, granularity), None)
        assert rows.values.shape == (0, 200) and rows.scale.shape == (0, 2 if granularity == "block" else 1)

    def test_a_token_does_not_know_of_others_and_a_tensor_does(self):
        x = sample(4, 128)
        louder = x.at[0].multiply(100)
        by_token, by_tensor = (
            functools.partial(quantize_rows, activation=Activation("int8", g), act_scale=None)
            for g in ("token", "tensor")
        )
        np.testing.assert_array_equal(by_token(louder).values[1:], by_token(x).values[1:])
        assert np.abs(np.asarray(by_tensor(louder).values[1:])).max() < 3

    def test_x_is_left_alone_where_a_scheme_asks_nothing(self):
        x = sample(4, 128, dtype="bfloat16")
        rows = quantize_rows(x, None, None)
        assert rows.values is x and rows.scale is None
        np.testing.assert_array_equal(np.asarray(rows.dequantize()), np.asarray(x, F32))

    def test_rows_are_a_pytree(self):
        rows = quantize_rows(sample(4, 128), Activation("int8"), None)
        assert len(jax.tree.leaves(rows)) == 2
        assert isinstance(jax.jit(lambda r: r)(rows), Rows)
