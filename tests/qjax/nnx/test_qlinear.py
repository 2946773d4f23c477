"""QLinear against nnx.Linear on the kernel that it dequantizes to."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import qjax
from qjax.errors import QTensorError, QuantizeError
from qjax.nnx import QEinsum, QEmbed, QLinear, QLinearGeneral, QParam

SPECS = """
w4a16:group_size=32 w4a16:group_size=64,symmetric=false w3a16 w2a16 w5a16 w6a16 w8a16 fp8 fp8:granularity=block
nf4 nf4:double_quant=true fp4 mxfp4 mxfp8 nvfp4
""".split()
OWN = {"scheme", "backend", "partial_groups"}


def x_of(*shape: int, dtype: str = "float32") -> jax.Array:
    """Standard normal."""
    return jax.random.normal(jax.random.key(7), shape, dtype)


def float_twin(layer: QLinear, **arguments: object) -> nnx.Linear:
    """nnx.Linear with the dequantized kernel and the same bias."""
    twin = nnx.Linear(layer.in_features, layer.out_features, use_bias=layer.use_bias, rngs=nnx.Rngs(0), **arguments)
    twin.kernel = nnx.Param(layer.kernel.get_value().dequantize())
    twin.bias = layer.bias
    return twin


class QLinearTest(parameterized.TestCase):
    @parameterized.parameters(*SPECS)
    def test_it_equals_linear_on_the_dequantized_kernel(self, scheme: str) -> None:
        bias_init, use_bias = nnx.initializers.normal(), not scheme.startswith("w")
        layer = QLinear(256, 24, scheme=scheme, use_bias=use_bias, bias_init=bias_init, rngs=nnx.Rngs(0))
        x = x_of(2, 3, 256)
        chex.assert_trees_all_close(layer(x), float_twin(layer)(x), rtol=1e-5, atol=1e-5)

    def test_its_kernel_is_the_quantized_draw_of_linear(self) -> None:
        layer = QLinear(128, 16, scheme="w8a16", bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(3))
        linear = nnx.Linear(128, 16, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(3))
        chex.assert_trees_all_equal(layer.kernel.get_value(), qjax.quantize_array(linear.kernel[...], "w8a16"))
        chex.assert_trees_all_equal(layer.bias[...], linear.bias[...])

    @parameterized.parameters("w8a8_int8", "w8a8_fp8", "w4a8_int8")
    def test_activation_schemes_multiply_as_matmul_does(self, scheme: str) -> None:
        layer = QLinear(128, 16, scheme=scheme, use_bias=False, rngs=nnx.Rngs(0))
        x = x_of(5, 128)
        chex.assert_trees_all_equal(layer(x), qjax.matmul(x, layer.kernel.get_value()))
        chex.assert_trees_all_close(layer(x), float_twin(layer)(x), rtol=0.1, atol=0.1)

    @parameterized.parameters(
        ("float32", "float32", None, None, True),
        ("bfloat16", "float32", None, None, True),
        ("float32", "bfloat16", None, None, False),
        ("bfloat16", "bfloat16", None, None, True),
        ("bfloat16", "bfloat16", "float32", None, True),
        ("float32", "float32", "bfloat16", None, True),
        ("bfloat16", "bfloat16", None, "float32", False),
        ("bfloat16", "bfloat16", None, "float32", True),
        ("float32", "float32", None, "bfloat16", False),
        ("float32", "float32", None, "bfloat16", True),
    )
    def test_dtypes_follow_flax(
        self, x_dtype: str, param_dtype: str, dtype: str | None, preferred: str | None, use_bias: bool
    ) -> None:
        arguments = dict(param_dtype=param_dtype, dtype=dtype, preferred_element_type=preferred, use_bias=use_bias)
        layer = QLinear(32, 8, scheme="w8a16", **arguments, rngs=nnx.Rngs(0))
        linear = nnx.Linear(32, 8, **arguments, rngs=nnx.Rngs(0))
        x = x_of(3, 32, dtype=x_dtype)
        assert layer(x).dtype == linear(x).dtype
        assert layer.kernel.get_value().dtype == param_dtype
        chex.assert_trees_all_close(layer(x).astype("float32"), linear(x).astype("float32"), atol=0.06)

    def test_a_promote_dtype_of_the_users_decides(self) -> None:
        def to_bfloat16(args: tuple, *, dtype: object = None) -> tuple:
            del dtype
            return tuple(None if a is None else a.astype(jnp.bfloat16) for a in args)

        layer = QLinear(32, 8, scheme="w8a16", promote_dtype=to_bfloat16, rngs=nnx.Rngs(0))
        assert layer(x_of(3, 32)).dtype == jnp.bfloat16

    @parameterized.parameters((0, 32), (2, 0, 32), (32,))
    def test_any_leading_axes(self, *shape: int) -> None:
        layer = QLinear(32, 8, scheme="w8a16", rngs=nnx.Rngs(0))
        chex.assert_shape(layer(x_of(*shape)), (*shape[:-1], 8))

    def test_integers_are_promoted_as_flax_does(self) -> None:
        layer = QLinear(32, 8, scheme="w8a16", rngs=nnx.Rngs(0))
        ones = np.ones((2, 32), np.int32)
        chex.assert_trees_all_close(layer(ones), float_twin(layer)(ones), rtol=1e-5, atol=1e-5)

    def test_from_qtensor_shares_a_bias_and_takes_stacks(self) -> None:
        kernel = qjax.quantize_array(x_of(3, 64, 8, dtype="bfloat16"), "w4a16:group_size=32")
        bias = nnx.Param(x_of(3, 8))
        layer = QLinear.from_qtensor(kernel, bias=bias, dtype="float32", backend="xla")
        assert layer.bias is bias and layer.backend == "xla" and layer.param_dtype == jnp.bfloat16
        assert (layer.in_features, layer.out_features, layer.use_bias) == (64, 8, True)
        y = nnx.vmap(lambda one, x: one(x), in_axes=(0, None))(layer, x_of(5, 64))
        chex.assert_trees_all_close(
            y, jnp.einsum("mk,bkn->bmn", x_of(5, 64), kernel.dequantize("float32")) + bias[...][:, None], atol=1e-4
        )
        assert QLinear.from_qtensor(kernel).bias is None

    def test_from_linear_leaves_the_linear_as_it_is(self) -> None:
        linear = nnx.Linear(64, 8, dtype="bfloat16", rngs=nnx.Rngs(0))
        layer = QLinear.from_linear(linear, "w8a16")
        assert layer.bias is linear.bias and layer.dtype == "bfloat16" and isinstance(linear.kernel, nnx.Param)
        chex.assert_trees_all_close(layer(x_of(64)).astype("float32"), linear(x_of(64)).astype("float32"), atol=0.05)

    def test_bad_arguments_are_named(self) -> None:
        with pytest.raises(QuantizeError, match="group_size=128 does not divide K=96"):
            QLinear(96, 8, scheme="w4a16", rngs=nnx.Rngs(0))
        assert QLinear(96, 8, scheme="w4a16", partial_groups=True, rngs=nnx.Rngs(0))(x_of(96)).shape == (8,)
        with pytest.raises(NotImplementedError, match="QLinear: dot_general"):
            QLinear(32, 8, scheme="w8a16", dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0))
        with pytest.raises(qjax.errors.BackendError, match="unheard"):
            QLinear(32, 8, scheme="w8a16", backend="unheard", rngs=nnx.Rngs(0))(x_of(32))
        other = qjax.quantize_array(x_of(32, 4), "w8a16")
        with pytest.raises(QTensorError, match=r"no kernel of shape \(32, 8\)"):
            QLinear(32, 8, scheme="w8a16", kernel_init=lambda *_: other, rngs=nnx.Rngs(0))

    def test_a_kernel_cannot_be_indexed_and_says_what_can(self) -> None:
        layer = QLinear(32, 8, scheme="w8a16", rngs=nnx.Rngs(0))
        with pytest.raises(QTensorError, match="get_value"):
            layer.kernel[...]
        assert layer.kernel.shape == (32, 8) and layer.kernel.scheme == qjax.W8A16()

    def test_out_sharding_is_for_explicit_meshes(self) -> None:
        layer = QLinear(32, 8, scheme="w8a16", rngs=nnx.Rngs(0))
        spec = PartitionSpec("data")
        with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
            assert layer(x_of(16, 32), out_sharding=spec).sharding.spec == PartitionSpec("data", None)
        with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
            with pytest.raises(ValueError, match="Auto"):
                layer(x_of(16, 32), out_sharding=spec)


@pytest.mark.parametrize(
    ("ours", "flax"),
    [(QLinear, nnx.Linear), (QLinearGeneral, nnx.LinearGeneral), (QEinsum, nnx.Einsum), (QEmbed, nnx.Embed)],
)
def test_a_layer_takes_what_flax_takes(ours: type, flax: type) -> None:
    mine, theirs = (inspect.signature(c.__init__).parameters for c in (ours, flax))
    assert set(mine) - set(theirs) == OWN
    for name, parameter in theirs.items():
        assert mine[name].kind == parameter.kind, name
        if name != "batch_axis":  # an empty mapping of another type
            assert mine[name].default == parameter.default, name
    for method in {"__call__", "attend"} & set(vars(flax)):
        assert list(inspect.signature(getattr(ours, method)).parameters) == list(
            inspect.signature(getattr(flax, method)).parameters
        )


def test_hooks_that_expect_an_array_are_refused() -> None:
    metadata = {"on_get_value": lambda _, value: value * 2}
    with pytest.warns(UserWarning, match="hooks"), pytest.raises(QuantizeError, match="on_get_value"):
        QLinear(32, 8, scheme="w8a16", kernel_metadata=metadata, rngs=nnx.Rngs(0))


def test_metadata_of_the_kernel_stays_on_it() -> None:
    layer = QLinear(32, 8, scheme="w8a16", kernel_metadata={"team": "a"}, rngs=nnx.Rngs(0))
    assert isinstance(layer.kernel, QParam) and layer.kernel.get_metadata("team") == "a"
