"""`qjax.matmul` on the reference backend: every case against float64, epilogues, x that is prepared, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from cases import CASES, Case, assert_product, float64, oracle, x_met

import qjax
from qjax.errors import BackendError, QTensorError
from qjax.kernel_call import features_of

SMALL = Case("w4a16", 6, 256, 48)


class ProductTest(parameterized.TestCase):
    @parameterized.named_parameters((str(c), c) for c in CASES)
    def test_every_case_in_float32_is_within_the_bound_of_a_float32_sum(self, case: Case):
        x, w = case.x(), case.qtensor()
        assert_product(qjax.matmul(x, w), x, w)

    @parameterized.product(
        scheme=("w4a16", "w4a16:group_size=32,symmetric=false", "w8a16", "fp8", "nf4:double_quant=true", "nvfp4"),
        dtype=("bfloat16", "float16"),
    )
    def test_a_16_bit_result_is_rounded_once(self, scheme: str, dtype: str):
        case = Case(scheme, 5, 256, 40)
        x, w = case.x(dtype), case.qtensor()
        y = qjax.matmul(x, w)
        self.assertEqual(y.dtype, jnp.dtype(dtype))
        assert_product(y, x, w)

    @parameterized.parameters(None, "relu", "silu", "gelu", "gelu_tanh")
    def test_bias_activation_and_residual_follow_in_float32(self, activation: str | None):
        x, w, rng = SMALL.x("bfloat16"), SMALL.qtensor(), np.random.default_rng(0)
        bias = jnp.asarray(rng.standard_normal(SMALL.n), jnp.float32)
        residual = jnp.asarray(rng.standard_normal((SMALL.m, SMALL.n)), jnp.bfloat16)
        y = qjax.matmul(x, w, bias, activation=activation, residual=residual)
        assert_product(y, x, w, bias, activation, residual)

    def test_leading_axes_of_x_are_rows(self):
        x, w = SMALL.x(), SMALL.qtensor()
        y = qjax.matmul(x, w)
        again = qjax.matmul(x.reshape(1, 2, 3, -1), w).reshape(y.shape)
        np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(qjax.matmul(x[0], w), y[0], rtol=1e-5, atol=1e-5)
        self.assertEqual(qjax.matmul(x[:0].reshape(2, 0, SMALL.k), w).shape, (2, 0, SMALL.n))

    def test_stacked_weights_meet_their_own_rows(self):
        ws = jnp.stack([Case("w4a16", 6, 256, 48 + i).kernel()[:, :48] for i in range(3)])
        w, x = qjax.quantize_array(ws, "w4a16"), jnp.stack([SMALL.x() * i for i in (1, 2, 3)])
        np.testing.assert_allclose(qjax.matmul(x, w), np.asarray(x) @ np.asarray(w.dequantize()), rtol=2e-5, atol=2e-5)

    def test_out_dtype_keeps_the_accumulator(self):
        x, w = SMALL.x("bfloat16"), SMALL.qtensor()
        y = qjax.matmul(x, w, out_dtype=jnp.float32)
        assert y.dtype == jnp.float32
        assert_product(y, x, w)

    def test_act_order_and_input_scale_are_applied_to_x(self):
        rng, w, x = np.random.default_rng(1), SMALL.qtensor(), SMALL.x()
        perm = jnp.asarray(rng.permutation(SMALL.k), jnp.int32)
        scale = jnp.asarray(rng.uniform(0.5, 2, SMALL.k), jnp.float32)
        moved = dataclasses.replace(w, input_perm=perm, input_scale=scale)
        want = oracle(np.asarray(x * scale, np.float64)[:, np.asarray(perm)], float64(w))
        np.testing.assert_allclose(qjax.matmul(x, moved), want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(x @ moved.dequantize(), want, rtol=1e-3, atol=1e-3)

    @parameterized.parameters(32, 80, 96, -1)
    def test_pieces_of_k_may_be_padded_to_no_whole_number_of_groups(self, group: int):
        rng = np.random.default_rng(0)
        kernel, x = jnp.asarray(rng.normal(size=(960, 8)), jnp.float32), jnp.asarray(rng.normal(size=(3, 960)))
        w = qjax.quantize_array(kernel, f"w4a16:group_size={group}", k_pieces=2)
        assert w.k_piece == (480, 512)
        assert ("pieces_cut_groups" in features_of(w)) == (group in (80, 96))
        assert_product(qjax.matmul(x, w), x, w)

    def test_quantized_x_is_what_the_weight_meets(self):
        case = Case("w8a8_int8", 6, 256, 48)
        x, w = case.x(), case.qtensor()
        exact = np.asarray(x, np.float64) @ float64(w)
        met = x_met(x, w) @ float64(w)
        got = np.asarray(qjax.matmul(x, w), np.float64)
        self.assertLess(np.abs(got - met).max(), 1e-4)
        self.assertGreater(np.abs(got - exact).max(), 1e-3)


class ErrorTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("k", dict(x=jnp.ones((2, 128))), r"x must be \[\.\.\., 256\]"),
        ("integers", dict(x=jnp.ones((2, 256), jnp.int32)), "x has dtype int32"),
        ("bias", dict(bias=jnp.ones(3)), r"bias of shape \(3,\)"),
        ("residual", dict(residual=jnp.ones((2, 3))), r"residual of shape \(2, 3\)"),
        ("activation", dict(activation="swish"), "unknown activation 'swish'"),
    )
    def test_what_does_not_meet_is_named(self, given: dict, message: str):
        with self.assertRaisesRegex(QTensorError, message):
            qjax.matmul(**{"x": SMALL.x(), "w": SMALL.qtensor(), **given})

    def test_a_plain_array_is_no_weight(self):
        with self.assertRaisesRegex(QTensorError, r"^x is a QTensor\(.*; the weight comes second: matmul\(x, w\)"):
            qjax.matmul(SMALL.qtensor(), SMALL.x())
        with self.assertRaisesRegex(QTensorError, "multiplies by a QTensor"):
            qjax.matmul(SMALL.x(), jnp.ones((256, 4)))

    def test_a_cast_of_the_whole_tree_is_noticed(self):
        for scheme, codes in (("w4a16", "uint32"), ("w8a16", "int8"), ("fp8", "float8_e4m3fn")):
            w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), qjax.quantize_array(SMALL.kernel(), scheme))
            with self.assertRaisesRegex(QTensorError, f"weight are bfloat16; they have to stay {codes}: cast floats"):
                qjax.matmul(SMALL.x(), w)

    def test_a_static_scale_has_to_be_there(self):
        w = qjax.quantize_array(SMALL.kernel(), "w8a8_int8:mode=static")
        with self.assertRaisesRegex(QTensorError, "no act_scale"):
            qjax.matmul(SMALL.x(), w)

    def test_an_unknown_backend_names_those_possible(self):
        with self.assertRaisesRegex(BackendError, "possible on .*xla"):
            qjax.matmul(SMALL.x(), SMALL.qtensor(), backend="cutlass")

    def test_a_backend_that_cannot_is_an_error_and_no_fallback(self):
        with self.assertRaisesRegex(BackendError, "cannot run"):
            qjax.matmul(SMALL.x(), SMALL.qtensor(), backend="mosaic")


@pytest.mark.parametrize("spec", ["btd,dnh->btnh", "...d,dnh->...nh", "btd,dnh->nbht"])
def test_einsum_contracts_as_jnp_does(spec: str):
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (64, 128)), "w8a16")
    w = dataclasses.replace(w, out_shape=(4, 32))
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    want = jnp.einsum(spec, x, w.dequantize())
    np.testing.assert_allclose(qjax.einsum(spec, x, w), want, rtol=1e-4, atol=1e-4)


def test_einsum_follows_the_kernel_s_own_order_of_axes():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (64, 128)), "w8a16")
    w = dataclasses.replace(w, out_shape=(4, 32), axes=(1, 0, 2))
    assert w.shape == (4, 64, 32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    want = jnp.einsum("btd,ndh->btnh", x, w.dequantize())
    np.testing.assert_allclose(qjax.einsum("btd,ndh->btnh", x, w), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["btd,dn->bt", "btd,dn", "btx,dn->btn", "bbd,dn->bn"])
def test_einsum_says_what_it_cannot_serve(spec: str):
    w = qjax.quantize_array(jnp.ones((64, 16)), "w8a16")
    with pytest.raises(QTensorError, match="einsum"):
        qjax.einsum(spec, jnp.ones((2, 2, 64)), w)


if __name__ == "__main__":
    absltest.main()
