"""QEmbed against nnx.Embed on the table that it dequantizes to."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from flax import nnx

import qjax
from qjax.errors import QTensorError
from qjax.nnx import QEmbed, QParam

SPECS = """
w4a16:group_size=32 w4a16:group_size=64,symmetric=false w8a16 w8a16:group_size=tensor fp8 fp8:granularity=block
nf4 nf4:double_quant=true mxfp4 nvfp4
""".split()


def layers(scheme: str, *size: int, **arguments: object) -> tuple[QEmbed, nnx.Embed]:
    """The quantized embedding and its float twin on the same table."""
    layer = QEmbed(*size, scheme=scheme, **arguments, rngs=nnx.Rngs(2))
    twin = nnx.Embed(*size, **arguments, rngs=nnx.Rngs(2))
    twin.embedding = nnx.Param(layer.embedding.get_value().dequantize())
    return layer, twin


class QEmbedTest(parameterized.TestCase):
    @parameterized.parameters(*SPECS)
    def test_look_up_and_attend_equal_embed_on_the_dequantized_table(self, scheme: str) -> None:
        layer, twin = layers(scheme, 200, 128)
        assert layer.embedding.shape == (200, 128)
        indices = jnp.array([[0, 199, -1], [130, 7, 7]])
        chex.assert_trees_all_equal(layer(indices), twin(indices))
        query = jax.random.normal(jax.random.key(0), (3, 128))
        chex.assert_trees_all_close(layer.attend(query), twin.attend(query), rtol=1e-5, atol=1e-5)

    def test_its_table_is_the_quantized_draw_of_embed(self) -> None:
        layer = QEmbed(50, 64, scheme="w8a16", rngs=nnx.Rngs(2))
        drawn = nnx.Embed(50, 64, rngs=nnx.Rngs(2)).embedding[...]
        chex.assert_trees_all_close(layer.embedding.get_value().dequantize(), drawn, atol=0.01)

    def test_indices_outside_give_nan_as_in_flax(self) -> None:
        layer, twin = layers("w8a16", 10, 64)
        indices = jnp.array([9, 10, -10, -11])
        chex.assert_trees_all_equal(layer(indices), twin(indices))
        assert jnp.isnan(layer(indices)[:, 0]).tolist() == [False, True, False, True]

    def test_a_table_of_one_row_serves_every_index(self) -> None:
        layer, twin = layers("w8a16", 1, 64)
        chex.assert_trees_all_equal(layer(jnp.arange(4)), twin(jnp.arange(4)))

    @parameterized.parameters((None, "float32"), (None, "bfloat16"), ("bfloat16", "float32"))
    def test_dtypes_follow_flax(self, dtype: str | None, param_dtype: str) -> None:
        layer, twin = layers("w8a16", 10, 64, dtype=dtype, param_dtype=param_dtype)
        query = jnp.ones((2, 64), param_dtype)
        assert layer(jnp.arange(3)).dtype == twin(jnp.arange(3)).dtype
        assert layer.attend(query).dtype == twin.attend(query).dtype

    def test_only_the_rows_looked_up_are_decoded(self) -> None:
        layer, _ = layers("w4a16:group_size=64", 4096, 64)
        flops = jax.jit(lambda i: layer(i)).lower(jnp.arange(3)).compile().cost_analysis()["flops"]
        assert flops < 64 * 4096, flops

    def test_from_qtensor_takes_a_head_or_a_table(self) -> None:
        head = qjax.quantize_array(jax.random.normal(jax.random.key(0), (64, 20)), "w8a16")
        layer = QEmbed.from_qtensor(head)
        assert (layer.num_embeddings, layer.features, layer.embedding.shape) == (20, 64, (20, 64))
        chex.assert_trees_all_equal(layer(jnp.arange(20)), head.dequantize().T)
        again = QEmbed.from_qtensor(layer.embedding.get_value(), dtype="bfloat16")
        chex.assert_trees_all_equal(again(jnp.arange(20)), head.dequantize("bfloat16").T)

    def test_from_embed(self) -> None:
        embed = nnx.Embed(20, 64, rngs=nnx.Rngs(0))
        chex.assert_trees_all_close(QEmbed.from_embed(embed, "w8a16")(jnp.arange(20)), embed(jnp.arange(20)), atol=0.01)

    def test_floats_are_no_indices(self) -> None:
        with pytest.raises(QTensorError, match="looked up by integers; got float32"):
            layers("w8a16", 10, 64)[0](jnp.ones(3))

    def test_its_table_has_no_gradient(self) -> None:
        layer = QEmbed(10, 64, scheme="fp8", rngs=nnx.Rngs(0))
        with pytest.raises(TypeError, match="no gradient"):
            nnx.grad(lambda m: m(jnp.arange(3)).sum(), argnums=nnx.DiffState(0, QParam))(layer)
