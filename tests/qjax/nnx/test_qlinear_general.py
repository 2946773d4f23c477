"""QLinearGeneral against nnx.LinearGeneral on the kernel that it dequantizes to."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from flax import nnx

from qjax.errors import QTensorError
from qjax.nnx import QLinearGeneral

CASES = {
    "one_to_one": dict(in_features=32, out_features=8, x=(4, 32)),
    "one_to_heads": dict(in_features=32, out_features=(4, 8), x=(2, 3, 32)),
    "heads_to_one": dict(in_features=(4, 16), out_features=8, axis=(-2, -1), x=(2, 3, 4, 16)),
    "apart": dict(in_features=(4, 16), out_features=(8, 2), axis=(1, -1), x=(2, 4, 3, 16)),
    "axis_in_any_order": dict(in_features=(4, 16), out_features=8, axis=(-1, 1), x=(2, 4, 3, 16)),
    "batch": dict(in_features=32, out_features=8, batch_axis={0: 3}, x=(3, 5, 32)),
    "two_batches": dict(in_features=16, out_features=(2, 4), batch_axis={0: 3, 1: 2}, x=(3, 2, 5, 16)),
}


def layers(x: tuple[int, ...], **arguments: object) -> tuple[QLinearGeneral, nnx.LinearGeneral, jax.Array]:
    """The quantized layer, its float twin on the same weights, and an input."""
    arguments |= dict(bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(5))
    twin = nnx.LinearGeneral(**arguments)
    arguments["rngs"] = nnx.Rngs(5)
    layer = QLinearGeneral(**arguments, scheme="w4a16:group_size=16")
    chex.assert_trees_all_close(layer.kernel.get_value().dequantize(), twin.kernel[...], atol=0.2)
    twin.kernel = nnx.Param(layer.kernel.get_value().dequantize())
    return layer, twin, jax.random.normal(jax.random.key(1), x)


class QLinearGeneralTest(parameterized.TestCase):
    @parameterized.named_parameters(CASES.items())
    def test_it_equals_linear_general_on_the_dequantized_kernel(self, case: dict) -> None:
        layer, twin, x = layers(**case)
        chex.assert_trees_all_equal(layer.bias[...], twin.bias[...])
        chex.assert_trees_all_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)

    def test_from_linear_gives_the_same_layer(self) -> None:
        layer, twin, x = layers(**CASES["axis_in_any_order"])
        chex.assert_trees_all_close(QLinearGeneral.from_linear(twin, "w8a16")(x), layer(x), atol=0.1)

    def test_from_qtensor_reads_its_features_from_the_kernel(self) -> None:
        layer, twin, x = layers(**CASES["batch"] | dict(out_features=(2, 4)))
        again = QLinearGeneral.from_qtensor(layer.kernel.get_value(), bias=layer.bias)
        assert (again.in_features, again.out_features, dict(again.batch_axis)) == ((32,), (2, 4), {0: 3})
        chex.assert_trees_all_close(again(x), twin(x), rtol=1e-5, atol=1e-5)

    def test_attention_runs_on_swapped_projections(self) -> None:
        attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (2, 6, 32))
        y = attention(x)
        for name in ("query", "key", "value", "out"):
            setattr(attention, name, QLinearGeneral.from_linear(getattr(attention, name), "w8a16"))
        chex.assert_trees_all_close(attention(x), y, atol=0.02)

    def test_dtypes_follow_flax(self) -> None:
        arguments = dict(in_features=32, out_features=(2, 4), preferred_element_type="float32", dtype="bfloat16")
        layer = QLinearGeneral(**arguments, scheme="w8a16", rngs=nnx.Rngs(0))
        x = jnp.ones((3, 32), jnp.bfloat16)
        assert layer(x).dtype == nnx.LinearGeneral(**arguments, rngs=nnx.Rngs(0))(x).dtype == jnp.float32

    def test_axes_that_do_not_fit_are_named(self) -> None:
        with pytest.raises(QTensorError, match=r"in_features=\(32,\) and axis=\(0, 1\)"):
            QLinearGeneral(32, 8, axis=(0, 1), scheme="w8a16", rngs=nnx.Rngs(0))
        with pytest.raises(QTensorError, match="without a gap"):
            QLinearGeneral(32, 8, batch_axis={1: 4}, scheme="w8a16", rngs=nnx.Rngs(0))
        with pytest.raises(NotImplementedError, match="dot_general_cls"):
            QLinearGeneral(32, 8, dot_general_cls=object, scheme="w8a16", rngs=nnx.Rngs(0))
