"""Rows of a table: those of the dequantized table, bit by bit, and nothing else decoded."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import WEIGHT_ONLY

from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.lookup import look_up
from qjax.qtensor import QTensor

V, D = 37, 256
ROWS = jnp.array([[0, 36, -1], [5, 5, -37]])


def table(scheme: str, dtype: str = "float32") -> QTensor:
    """A table `[V, D]` as `nn.Embed` has it."""
    values = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    return quantize_kernel(jnp.asarray(values, dtype), scheme, KernelUse((1,)))


class LookUpTest(parameterized.TestCase):
    @parameterized.parameters(*WEIGHT_ONLY)
    def test_a_lookup_is_the_rows_of_the_dequantized_table(self, scheme: str) -> None:
        w = table(scheme)
        assert w.shape == (V, D)
        chex.assert_trees_all_equal(jax.jit(look_up)(w, ROWS), jnp.take(w.dequantize(), ROWS, axis=0))

    def test_rows_have_the_dtype_of_the_table(self) -> None:
        w = table("w4a16", "bfloat16")
        chex.assert_trees_all_equal(look_up(w, ROWS), jnp.take(w.dequantize(), ROWS, axis=0))
        assert look_up(w, ROWS).dtype == jnp.bfloat16

    def test_an_index_outside_is_nan_as_in_jax(self) -> None:
        w = table("nf4")
        got = np.asarray(look_up(w, jnp.array([V, -V - 1, 3])))
        assert np.isnan(got[:2]).all() and np.isfinite(got[2]).all()

    def test_act_order_and_input_scales_are_undone(self) -> None:
        rng = np.random.default_rng(1)
        w = dataclasses.replace(
            table("w4a16"),
            input_perm=jnp.asarray(rng.permutation(D), jnp.int32),
            input_scale=jnp.asarray(rng.uniform(0.5, 2, D), jnp.float32),
        )
        chex.assert_trees_all_equal(look_up(w, ROWS), jnp.take(w.dequantize(), ROWS, axis=0))

    def test_only_the_rows_asked_for_are_decoded(self) -> None:
        text = jax.jit(look_up).lower(table("w4a16"), ROWS).as_text()
        assert f"tensor<{V}x{D}x" not in text

    def test_the_gradient_of_a_table_is_refused(self) -> None:
        with pytest.raises(TypeError, match="a table of w4a16:group_size=128 has no gradient"):
            jax.grad(lambda w: look_up(w, ROWS).sum(), allow_int=True)(table("w4a16"))
