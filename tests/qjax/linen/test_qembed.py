"""QEmbed against `nn.Embed` on the dequantized table: lookups bit by bit, `attend` as a product."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from cases import WEIGHT_ONLY

from qjax.errors import QuantizeError
from qjax.linen import QEmbed
from qjax.qtensor import is_qtensor
from qjax.schemes import W4A16

KEY = jax.random.key(0)
IDS = jnp.array([[0, 49, -1], [7, 7, 50]])
W4 = W4A16(group_size=32)


def floats(variables):
    """The variables with a dequantized table."""
    return jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, variables, is_leaf=is_qtensor)


class QEmbedTest(parameterized.TestCase):
    @parameterized.parameters(*WEIGHT_ONLY)
    def test_every_scheme(self, scheme):
        layer = QEmbed(50, 128, scheme=scheme)
        variables = layer.init(KEY, IDS)
        table = variables["params"]["embedding"]
        self.assertEqual((table.shape, table.out_features, table.in_features), ((50, 128), 50, 128))
        flax = nn.Embed(50, 128)
        np.testing.assert_array_equal(layer.apply(variables, IDS), flax.apply(floats(variables), IDS))
        query = jax.random.normal(KEY, (2, 128))
        want = flax.apply(floats(variables), query, method="attend")
        np.testing.assert_allclose(layer.apply(variables, query, method="attend"), want, rtol=1e-4, atol=1e-3)

    @parameterized.product(dtype=(None, "bfloat16", "float32"), param_dtype=("float32", "bfloat16"))
    def test_dtypes_are_flaxs(self, dtype, param_dtype):
        layer, flax = (make(50, 64, dtype=dtype, param_dtype=param_dtype) for make in (QEmbed64, nn.Embed))
        variables = layer.init(KEY, IDS)
        query = jax.random.normal(KEY, (2, 64), jnp.bfloat16)
        got, want = layer.apply(variables, IDS), flax.apply(floats(variables), IDS)
        self.assertEqual(got.dtype, want.dtype)
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
        got = layer.apply(variables, query, method="attend")
        self.assertEqual(got.dtype, flax.apply(floats(variables), query, method="attend").dtype)

    def test_one_embedding_is_broadcast_whatever_the_index(self):
        layer = QEmbed(1, 64, scheme=W4)
        variables = layer.init(KEY, IDS)
        np.testing.assert_array_equal(layer.apply(variables, IDS), nn.Embed(1, 64).apply(floats(variables), IDS))

    def test_init_quantizes_what_flax_would_draw(self):
        drawn = nn.Embed(50, 64).init(KEY, IDS)["params"]["embedding"]
        table = QEmbed(50, 64, scheme="w8a16").init(KEY, IDS)["params"]["embedding"]
        half_step = float(jnp.max(table.scale)) / 2
        chex.assert_trees_all_close(table.dequantize(), drawn, atol=half_step * 1.001)

    def test_floats_are_no_indices(self):
        with self.assertRaisesRegex(QuantizeError, "inputs of dtype float32; an embedding takes integers"):
            QEmbed(50, 64, scheme=W4).init(KEY, jnp.ones(3))


def QEmbed64(*args, **kwargs) -> QEmbed:
    """With groups that divide 64."""
    return QEmbed(*args, **kwargs, scheme=W4)
