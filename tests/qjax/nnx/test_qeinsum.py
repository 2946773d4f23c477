"""QEinsum against nnx.Einsum on the kernel that it dequantizes to."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from flax import nnx

from qjax.errors import QTensorError
from qjax.nnx import QEinsum

CASES = {
    "matrix": dict(einsum_str="bd,df->bf", kernel_shape=(32, 8), bias_shape=(8,), x=(3, 32)),
    "flax_docs": dict(einsum_str="nta,hab->nthb", kernel_shape=(8, 16, 4), bias_shape=(8, 4), x=(2, 3, 16)),
    "no_bias": dict(einsum_str="bthk,hkd->btd", kernel_shape=(2, 16, 8), bias_shape=None, x=(3, 5, 2, 16)),
    "dots": dict(einsum_str="...d,dnh->...nh", kernel_shape=(32, 2, 4), bias_shape=(2, 4), x=(2, 3, 32)),
    "experts": dict(einsum_str="ecd,edf->ecf", kernel_shape=(3, 32, 8), bias_shape=(3, 8), x=(3, 5, 32)),
    "outputs_first": dict(einsum_str="td,nd->tn", kernel_shape=(8, 32), bias_shape=(8,), x=(5, 32)),
}


def layers(x: tuple[int, ...], **arguments: object) -> tuple[QEinsum, nnx.Einsum, jax.Array]:
    """The quantized layer, its float twin on the same weights, and an input."""
    arguments |= dict(bias_init=nnx.initializers.normal())
    twin = nnx.Einsum(**arguments, rngs=nnx.Rngs(5))
    layer = QEinsum(**arguments, scheme="w8a16:group_size=16", rngs=nnx.Rngs(5))
    chex.assert_trees_all_close(layer.kernel.get_value().dequantize(), twin.kernel[...], atol=0.02)
    twin.kernel = nnx.Param(layer.kernel.get_value().dequantize())
    return layer, twin, jax.random.normal(jax.random.key(1), x)


class QEinsumTest(parameterized.TestCase):
    @parameterized.named_parameters(CASES.items())
    def test_it_equals_einsum_on_the_dequantized_kernel(self, case: dict) -> None:
        layer, twin, x = layers(**case)
        chex.assert_trees_all_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)

    def test_from_einsum_and_from_qtensor(self) -> None:
        layer, twin, x = layers(**CASES["flax_docs"])
        again = QEinsum.from_qtensor(layer.einsum_str, layer.kernel.get_value(), bias=layer.bias)
        chex.assert_trees_all_close(again(x), twin(x), rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(QEinsum.from_einsum(twin, "w8a16")(x), twin(x), atol=0.1)

    def test_a_call_may_bring_its_own_expression(self) -> None:
        layer, twin, x = layers(**CASES["matrix"])
        chex.assert_trees_all_close(layer(x[0], "d, df -> f"), twin(x[0], "d,df->f"), rtol=1e-5, atol=1e-5)
        with pytest.raises(QTensorError, match="contract"):
            layer(jnp.ones((3, 8)), "bf,df->bd")

    def test_expressions_that_cannot_be_served_are_named(self) -> None:
        with pytest.raises(QTensorError, match="'bd,df'"):
            QEinsum("bd,df", (32, 8), scheme="w8a16", rngs=nnx.Rngs(0))
        with pytest.raises(NotImplementedError, match="must lead the kernel 'keh'"):
            QEinsum("bek,keh->beh", (16, 3, 8), scheme="w8a16", rngs=nnx.Rngs(0))
        with pytest.raises(NotImplementedError, match="einsum_op"):
            QEinsum("bd,df->bf", (32, 8), einsum_op=max, scheme="w8a16", rngs=nnx.Rngs(0))
