"""QEinsum against `nn.Einsum` on the dequantized kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from qjax.errors import QuantizeError
from qjax.linen import QEinsum
from qjax.qtensor import is_qtensor
from qjax.schemes import W4A16

KEY = jax.random.key(0)
W4 = W4A16(group_size=32)


def floats(variables):
    """The variables with a dequantized kernel."""
    return jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, variables, is_leaf=is_qtensor)


class QEinsumTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("heads first", (2, 3, 64), (4, 64, 6), "BTD,NDH->BTNH"),
        ("from heads", (2, 3, 4, 16), (4, 16, 24), "BTNH,NHD->BTD"),
        ("a list, transposed result", (2, 3, 64), (64, 6), "btd, dh -> hbt"),
        ("q, k, v stacked", (2, 3, 64), (3, 4, 64, 6), "BTD,SNDH->SBTNH"),
        ("experts", (5, 3, 64), (5, 64, 8), "ebd,edf->ebf"),
        ("ellipsis", (2, 3, 64), (64, 4, 6), "...d,dnh->...nh"),
    )
    def test_it_is_flaxs(self, x_shape, shape, spec):
        x = jax.random.normal(KEY, x_shape)
        ours, flax = QEinsum(shape, spec, scheme=W4), nn.Einsum(shape, spec)
        variables = ours.init(KEY, x)
        bias = variables["params"]["bias"]
        self.assertEqual(bias.shape, flax.init(KEY, x)["params"]["bias"].shape)
        variables["params"]["bias"] = jax.random.normal(KEY, bias.shape)
        self.assertEqual(variables["params"]["kernel"].shape, shape)
        want = flax.apply(
            jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, variables, is_leaf=is_qtensor), x
        )
        for apply in (ours.apply, jax.jit(ours.apply)):
            np.testing.assert_allclose(apply(variables, x), want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))

    def test_the_expression_may_come_with_the_call(self):
        x = jax.random.normal(KEY, (2, 64))
        layer = QEinsum((64, 8), use_bias=False, scheme=W4)
        variables = layer.init(KEY, x, "bd,df->bf")
        want = x @ variables["params"]["kernel"].dequantize()
        np.testing.assert_allclose(layer.apply(variables, x, "bd,df->bf"), want, atol=1e-4)

    @parameterized.parameters(None, jnp.bfloat16)
    def test_dtypes_are_flaxs(self, preferred):
        x = jax.random.normal(KEY, (2, 64), jnp.bfloat16)
        options = dict(preferred_element_type=preferred, param_dtype=jnp.bfloat16)
        ours, flax = QEinsum((64, 8), "bd,df->bf", **options, scheme=W4), nn.Einsum((64, 8), "bd,df->bf", **options)
        self.assertEqual(ours.apply(ours.init(KEY, x), x).dtype, flax.apply(flax.init(KEY, x), x).dtype)

    @parameterized.parameters(
        ("bd,df", QuantizeError, "two operands and an explicit '->'"),
        ("bd,df,f->bf", QuantizeError, "two operands"),
        ("bd,fe->bf", QuantizeError, "^kernel: .* one has to be contracted"),
        ("ebd,def->ebf", NotImplementedError, "^kernel: layers are stacked over axes .1,."),
    )
    def test_expressions_that_cannot_be_served(self, spec, error, message):
        x = jnp.ones([4] * len(spec.split(",")[0]))
        shape = (4,) * len(spec.split(",")[1].split("-")[0])
        with self.assertRaisesRegex(error, message):
            QEinsum(shape, spec, use_bias=False, scheme="w8a16").init(KEY, x)
