"""The two forms that XLA fuses by itself: every format they read, every width, edges of shape, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import Case, assert_product, float64, x_met

from pallas_kernels import dense_dot
from pallas_kernels.xla import dequantize_dot, multiply_reduce, unpack
from qjax.dequantize import block_scales, dequantize
from qjax.formats import FORMATS
from qjax.qtensor import QTensor

FACTS = dict(x_format=None, features=frozenset(), transposed=False)


def call(module, x: jax.Array, w: QTensor, **options) -> jax.Array:
    block_n, group = w.scheme.block
    return module.matmul(
        x, w.packed, block_scales(w) if isinstance(w.scale, QTensor) else w.scale, weight=w.scheme.weight,
        bits=w.scheme.bits, group=group or w.in_features, block_n=block_n or w.out_features, zero_point=w.zero_point,
        global_scale=w.global_scale, codebook=w.codebook, **options,
    )  # fmt: skip


def relative(y: jax.Array, exact: np.ndarray) -> float:
    """Error over that of rounding the exact result to y's type."""
    rounding = np.linalg.norm(np.asarray(exact.astype(y.dtype), np.float64) - exact)
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / rounding)


class MultiplyReduce(parameterized.TestCase):
    @parameterized.parameters(
        (Case("w4a16", 1, 256, 37), None),
        (Case("w4a16:group_size=64,symmetric=false", 2, 320, 6), None),
        (Case("w4a16:group_size=32", 3, 288, 8), dict(rows=2, shares=3, copy_x=0)),
        (Case("w4a16:group_size=256", 1, 512, 12), dict(rows=4, shares=4, copy_x=1)),
        (Case("w6a16:group_size=64", 1, 256, 5), None),
        (Case("w5a16:symmetric=false", 1, 128, 9), None),
        (Case("w3a16:group_size=32", 1, 256, 9), None),
        (Case("w2a16", 2, 256, 7), None),
        (Case("nf4", 1, 256, 7), None),
        (Case("mxfp4", 1, 256, 9), None),
        (Case("nvfp4", 4, 256, 16), None),
        (Case("w8a16:group_size=64,symmetric=false", 2, 192, 7), None),
        (Case("fp8:granularity=block", 1, 256, 130), None),
        (Case("fp8:format=e5m2", 4, 200, 1), None),
    )
    def test_a_product_is_within_rounding_of_float64(self, case: Case, config):
        x, w = case.x("bfloat16"), case.qtensor()
        y = jax.jit(lambda x, w: call(multiply_reduce, x, w, config=config))(x, w)
        assert_product(y, x, w)

    def test_a_real_zero_point_is_taken_off_each_value(self):
        case = Case("w4a16:symmetric=false", 2, 256, 8)
        x, w = case.x("float16"), case.qtensor()
        zero = w.zero_point.astype(jnp.float32) + 0.3
        y = jax.jit(lambda: call(multiply_reduce, x, w.__class__(**{**vars(w), "zero_point": zero})))()
        exact = np.asarray(x, np.float64) @ (
            float64(w) - 0.3 * np.repeat(np.asarray(w.scale, np.float64), 128, axis=1).T
        )
        self.assertLess(relative(y, exact), 1.05)

    def test_an_epilogue_follows_in_float32(self):
        case = Case("w4a16", 2, 128, 16)
        x, w = case.x("bfloat16"), case.qtensor()
        bias, residual = jnp.arange(16, dtype=jnp.float32), jnp.ones((2, 16), jnp.bfloat16)
        y = jax.jit(
            lambda: call(
                multiply_reduce, x, w, bias=bias, residual=residual, activation=jax.nn.silu, out_dtype="float32"
            )
        )()
        assert_product(y, x, w, bias, "silu", residual)

    def test_a_stack_of_weights_is_a_vmap(self):
        case = Case("w4a16", 1, 128, 8)
        w = case.qtensor()
        xs = jax.random.normal(jax.random.key(0), (3, 1, 128))
        packed = jnp.stack([w.packed, w.packed + jnp.uint32(1), w.packed])
        dense = w.dequantize(jnp.float32)
        for module in (multiply_reduce, dequantize_dot):
            y = jax.jit(jax.vmap(lambda x, packed, m=module: call(m, x, w.__class__(**{**vars(w), "packed": packed}))))(
                xs, packed
            )
            np.testing.assert_allclose(y[2], xs[2] @ dense, rtol=1e-5, atol=1e-5)
            self.assertGreater(float(jnp.abs(y[1] - xs[1] @ dense).max()), 1e-3)

    def test_what_it_cannot_do_is_said(self):
        facts = dict(FACTS, weight="int4", bits=4, x_dtype="bfloat16")
        self.assertIn("here are 5", multiply_reduce.unsupported(5, 256, 8, group=128, **facts))
        self.assertIn("groups of 48", multiply_reduce.unsupported(1, 96, 8, group=48, **facts))
        self.assertIsNone(multiply_reduce.unsupported(1, 4304, 8, group=16, **facts))
        configs = multiply_reduce.configs(2, 256, 8, bits=4)
        self.assertIn(dict(rows=2, shares=2, copy_x=0), configs)


class DequantizeDot(parameterized.TestCase):
    @parameterized.parameters(
        Case("w6a16:group_size=64", 3, 256, 5),
        Case("w5a16:symmetric=false", 3, 128, 9),
        Case("w4a16:group_size=16,symmetric=false", 7, 304, 5),
        Case("w4a16:group_size=tensor", 2, 256, 4),
        Case("w3a16:group_size=32", 3, 288, 9),
        Case("w2a16", 3, 256, 7),
        Case("nf4:double_quant=true", 3, 256, 16),
        Case("mxfp4", 3, 256, 9),
        Case("nvfp4", 3, 256, 16),
        Case("w8a16:group_size=64,symmetric=false", 2, 192, 7),
        Case("fp8:granularity=block", 3, 200, 130),
        Case("mxfp8", 3, 256, 7),
        Case("w4a16", 0, 256, 4),
    )
    def test_a_product_either_way_is_that_of_the_dequantized_weight(self, case: Case):
        w = case.qtensor()
        if w.offset is not None:
            self.skipTest("nested scales with an offset")
        x = case.x("float32")
        assert_product(jax.jit(lambda x, w: call(dequantize_dot, x, w))(x, w), x, w)
        dy = jax.random.normal(jax.random.key(1), (case.m, case.n))
        back = jax.jit(lambda x, w: call(dequantize_dot, x, w, transposed=True))(dy, w)[:, : case.k]
        exact = np.asarray(dy, np.float64) @ float64(w).T
        np.testing.assert_allclose(back, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max(initial=1.0))

    @parameterized.parameters("bfloat16", "float16")
    def test_rounding_the_weight_costs_no_more_than_rounding_the_result(self, dtype: str):
        case = Case("w4a16", 64, 256, 96)
        x, w = case.x(dtype), case.qtensor()
        y = jax.jit(lambda x, w: call(dequantize_dot, x, w))(x, w)
        self.assertLess(relative(y, x_met(x, w) @ float64(w)), 1.6)

    @parameterized.product(transposed=[False, True], scheme=["w4a16", "fp8:granularity=block"])
    def test_a_weight_beyond_the_scratch_is_used_a_range_of_rows_at_a_time(self, transposed: bool, scheme: str):
        case = Case(scheme, 3, 256, 400)
        w = case.qtensor()
        x = jax.random.normal(jax.random.key(2), (3, 400 if transposed else 256))
        level = jnp.linspace(0.5, 2.0, 400)
        row = dict(global_scale=level)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dense_dot, "SCRATCH", 160 * 256 * 4)
            kernel = jax.jit(
                lambda x, w: dequantize_dot.matmul(
                    x, w.packed, w.scale, weight=w.scheme.weight, bits=w.scheme.bits, group=128,
                    block_n=w.scheme.block[0], transposed=transposed, **row,
                )
            ).lower(x, w).compile()  # fmt: skip
        self.assertIn("while", kernel.as_text())
        dense = float64(w) * np.asarray(level, np.float64)
        exact = np.asarray(x, np.float64) @ (dense.T if transposed else dense)
        np.testing.assert_allclose(kernel(x, w), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())

    def test_what_it_cannot_do_is_said(self):
        facts = dict(weight="nf4", x_dtype="bfloat16", features=frozenset({"offset"}))
        self.assertIn("offset", dequantize_dot.unsupported(1, 256, 8, x_format=None, **facts))
        self.assertIn("int8", dequantize_dot.unsupported(1, 256, 8, x_format="int8", **facts))


class Unpack(parameterized.TestCase):
    def test_its_tables_are_those_of_the_formats(self):
        for name, table in unpack.TABLES.items():
            np.testing.assert_array_equal(np.float32(table), np.float32(FORMATS[name].codebook))

    @parameterized.parameters("float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
    def test_scales_of_every_dtype_become_their_values(self, dtype: str):
        scale = jnp.asarray([[2.0**-127, 1.0, 64.0, 0.5]], jnp.float32).astype(dtype)
        np.testing.assert_array_equal(unpack.scale_values(scale), np.asarray(scale, np.float32))

    def test_a_table_of_the_tensors_own_is_used(self):
        case = Case("nf4", 2, 128, 8)
        w = case.qtensor()
        own = w.__class__(**{**vars(w), "codebook": jnp.linspace(-2.0, 3.0, 16)})
        x = case.x("float32")
        exact = np.asarray(x, np.float64) @ np.asarray(dequantize(own, jnp.float32), np.float64)
        for module in (multiply_reduce, dequantize_dot):
            np.testing.assert_allclose(jax.jit(lambda m=module: call(m, x, own))(), exact, rtol=1e-4, atol=1e-4)
