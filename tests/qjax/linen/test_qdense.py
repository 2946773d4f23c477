"""QDense and QDenseGeneral against Flax's own layers on the dequantized kernel."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import WEIGHT_ONLY, assert_product

from qjax.errors import BackendError, QTensorError, QuantizeError, SchemeError
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.linen import QDense, QDenseGeneral, QEinsum, QEmbed
from qjax.qtensor import is_qtensor
from qjax.schemes import W4A16, W8A16

KEY = jax.random.key(0)
W4 = W4A16(group_size=32)


def floats(variables):
    """The variables with dequantized kernels: what Flax's layer runs on."""
    return jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, variables, is_leaf=is_qtensor)


def agree(ours: nn.Module, flax: nn.Module, x: jax.Array, *, tolerance: float = 1e-5) -> None:
    """`ours` initialized and applied is `flax` on its dequantized params, also jitted, in value, shape and dtype."""
    variables = ours.init(KEY, x)
    bias = variables["params"].get("bias")
    if bias is not None:
        variables["params"]["bias"] = jax.random.normal(KEY, bias.shape).astype(bias.dtype)
    want = flax.apply(floats(variables), x)
    for apply in (ours.apply, jax.jit(ours.apply)):
        got = apply(variables, x)
        chex.assert_equal_shape([got, want])
        assert got.dtype == want.dtype
        scale = np.abs(np.asarray(want, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance * scale
        )


PAIRS = ((QDense, nn.Dense), (QDenseGeneral, nn.DenseGeneral), (QEinsum, nn.Einsum), (QEmbed, nn.Embed))


@pytest.mark.parametrize("ours, flax", PAIRS)
def test_arguments_are_flaxs_in_its_order_with_its_defaults_and_two_more(ours, flax) -> None:
    mine = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    theirs = [(p.name, p.default) for p in inspect.signature(flax).parameters.values()]
    own = [(name, default) for name, default in mine if name in ("scheme", "backend")]
    assert own == [("scheme", W4A16()), ("backend", None)]
    names = [name for name, _ in theirs if name not in ("parent", "name")]
    assert [name for name, _ in mine][: len(names)] == names
    for name, default in theirs:
        got = dict(mine)[name]
        assert got == default or getattr(got, "__qualname__", got) == getattr(default, "__qualname__", default), name


class QDenseTest(parameterized.TestCase):
    @parameterized.parameters(*WEIGHT_ONLY, "w8a8_int8", "w4a8_int8:group_size=32", "w8a8_fp8")
    def test_every_scheme(self, scheme):
        layer = QDense(24, scheme=scheme)
        x = jax.random.normal(KEY, (2, 3, 256))
        variables = layer.init(KEY, x)
        bias = variables["params"]["bias"] = jax.random.normal(KEY, (24,))
        assert_product(layer.apply(variables, x), x, variables["params"]["kernel"], bias)

    @parameterized.product(
        x_dtype=("float32", "bfloat16", "float16"),
        dtype=(None, "bfloat16"),
        param_dtype=("float32", "bfloat16"),
    )
    def test_dtypes_are_promoted_as_flax_promotes_them(self, x_dtype, dtype, param_dtype):
        x = jax.random.normal(KEY, (3, 64), x_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype)
        loose = "bfloat16" in (x_dtype, dtype, param_dtype)
        ours, flax = QDense(8, scheme=W4, **options), nn.Dense(8, **options)
        agree(ours, flax, x, tolerance=2e-2 if loose else 2e-3 if x_dtype == "float16" else 1e-5)

    def test_without_a_bias_and_with_a_dtype_rule_of_ones_own(self):
        def in_bfloat16(*args, dtype=None, inexact=True):
            return [None if a is None else jnp.asarray(a, jnp.bfloat16) for a in args]

        x = jax.random.normal(KEY, (3, 64))
        agree(QDense(8, use_bias=False, scheme=W4), nn.Dense(8, use_bias=False), x)
        agree(
            QDense(8, promote_dtype=in_bfloat16, scheme=W4), nn.Dense(8, promote_dtype=in_bfloat16), x, tolerance=2e-2
        )

    def test_init_quantizes_what_flax_would_draw(self):
        x = jnp.ones((1, 64))
        drawn = nn.Dense(8).init(KEY, x)["params"]["kernel"]
        got = QDense(8, scheme="nf4").init(KEY, x)["params"]["kernel"]
        chex.assert_trees_all_equal(got, quantize_kernel(drawn, "nf4", KernelUse((0,))))

    def test_shapes_tables_and_jitted_init_work(self):
        x = jnp.ones((1, 64))
        layer = QDense(8, scheme=W4)
        variables = layer.init(KEY, x)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(layer.init, KEY, x), variables)
        chex.assert_trees_all_equal(jax.jit(layer.init)(KEY, x), variables)
        self.assertIn("kernel", layer.tabulate(KEY, x))

    def test_gradients_with_respect_to_inputs_and_bias(self):
        x = jax.random.normal(KEY, (3, 64))
        layer = QDense(8, scheme=W4)
        params = layer.init(KEY, x)["params"]

        def loss(apply, kernel):
            return lambda x, bias: (apply({"params": {"kernel": kernel, "bias": bias}}, x) ** 2).sum()

        got = jax.grad(loss(layer.apply, params["kernel"]), (0, 1))(x, params["bias"])
        want = jax.grad(loss(nn.Dense(8).apply, params["kernel"].dequantize()), (0, 1))(x, params["bias"])
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)

    def test_the_gradient_of_the_kernel_is_refused(self):
        x = jnp.ones((3, 64))
        layer = QDense(8, scheme=W4)
        variables = layer.init(KEY, x)
        with self.assertRaisesRegex(TypeError, "a QTensor has no gradient"):
            jax.grad(lambda v: layer.apply(v, x).sum(), allow_int=True)(variables)

    def test_a_backend_is_the_users_word(self):
        x = jnp.ones((3, 64))
        variables = QDense(8, scheme=W4).init(KEY, x)
        QDense(8, scheme=W4, backend="xla").apply(variables, x)
        with self.assertRaisesRegex(BackendError, "nonsense"):
            QDense(8, scheme=W4, backend="nonsense").apply(variables, x)

    @parameterized.named_parameters(
        (
            "another K",
            8,
            jnp.ones((3, 96)),
            r"^kernel: the layer wants a QTensor of shape \(96, 8\); .* shape \(64, 8\)",
        ),
        ("another N", 9, jnp.ones((3, 64)), r"wants a QTensor of shape \(64, 9\)"),
    )
    def test_params_of_another_shape(self, features, x, message):
        variables = QDense(8, scheme=W4).init(KEY, jnp.ones((3, 64)))
        with self.assertRaisesRegex(QTensorError, message):
            QDense(features, scheme=W4).apply(variables, x)

    def test_float_params_are_told_apart(self):
        x = jnp.ones((3, 64))
        with self.assertRaisesRegex(QTensorError, "^kernel: .* a float array, which qjax.quantize makes a QTensor of"):
            QDense(8).apply(nn.Dense(8).init(KEY, x), x)

    def test_a_kernel_that_cannot_be_quantized_names_its_path(self):
        model = nn.Sequential([QDense(8), QDense(4, scheme="w4a16:group_size=32")])
        with self.assertRaisesRegex(QuantizeError, "^layers_0/kernel: group_size=128 does not divide K=64"):
            model.init(KEY, jnp.ones((3, 64)))

    def test_an_unknown_scheme(self):
        with self.assertRaisesRegex(SchemeError, "unknown scheme 'int4'"):
            QDense(8, scheme="int4").init(KEY, jnp.ones((3, 64)))

    @parameterized.parameters("dot_general", "dot_general_cls")
    def test_a_product_of_ones_own_is_refused(self, name):
        with self.assertRaisesRegex(NotImplementedError, f": {name}=.* with a quantized kernel"):
            QDense(8, scheme=W4, **{name: lambda *args, **kwargs: None}).init(KEY, jnp.ones((3, 64)))

    def test_a_params_tree_with_other_arrays_than_init_would_make(self):
        x = jax.random.normal(KEY, (3, 64))
        kernel = quantize_kernel(
            jax.random.normal(KEY, (64, 8)), W4A16(group_size=32, symmetric=False), KernelUse((0,))
        )
        layer = QDense(8, use_bias=False, scheme=W8A16())
        np.testing.assert_allclose(layer.apply({"params": {"kernel": kernel}}, x), x @ kernel.dequantize(), atol=1e-4)


class TransformedTest(parameterized.TestCase):
    def test_stacked_by_vmap(self):
        make = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        x = jax.random.normal(KEY, (3, 5, 64))
        agree(nn.vmap(QDense, **make)(8, scheme=W4), nn.vmap(nn.Dense, **make)(8), x)

    def test_stacked_by_scan_with_remat(self):
        def stack(make, **options):
            class Layer(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return x + nn.remat(make)(64, **options, name="dense")(x), None

            return nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()

        x = jax.random.normal(KEY, (5, 64))
        ours, flax = stack(QDense, scheme=W4), stack(nn.Dense)
        variables = ours.init(KEY, x, None)
        self.assertEqual(variables["params"]["dense"]["kernel"].shape, (3, 64, 64))
        want, _ = flax.apply(floats(variables), x, None)
        np.testing.assert_allclose(ours.apply(variables, x, None)[0], want, rtol=1e-5, atol=1e-4)


class QDenseGeneralTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("as Dense", (2, 3, 64), dict(features=8)),
        ("to heads", (2, 3, 64), dict(features=(4, 6))),
        ("from heads", (2, 3, 4, 32), dict(features=8, axis=(-2, -1))),
        ("axes out of order", (4, 3, 32), dict(features=(2, 8), axis=(-1, 0))),
        ("batched", (3, 2, 64), dict(features=(4, 6), batch_dims=(0,))),
        ("batched twice, from heads", (3, 2, 5, 4, 16), dict(features=8, axis=(-2, -1), batch_dims=(0, 1))),
        ("no bias", (2, 64), dict(features=8, use_bias=False)),
        ("bfloat16", (2, 64), dict(features=(4, 6), dtype=jnp.bfloat16), 2e-2),
    )
    def test_it_is_flaxs(self, shape, options, tolerance=1e-5):
        x = jax.random.normal(KEY, shape)
        agree(QDenseGeneral(**options, scheme=W4), nn.DenseGeneral(**options), x, tolerance=tolerance)

    def test_init_quantizes_what_flax_would_draw(self):
        x = jnp.ones((2, 4, 32))
        options = dict(features=(2, 3), axis=(-2, -1))
        drawn = nn.DenseGeneral(**options).init(KEY, x)["params"]["kernel"]
        got = QDenseGeneral(**options, scheme=W4).init(KEY, x)["params"]["kernel"]
        chex.assert_trees_all_equal(got, quantize_kernel(drawn, W4, KernelUse((0, 1))))
        self.assertEqual(got.shape, (4, 32, 2, 3))

    def test_batch_axes_that_do_not_lead(self):
        with self.assertRaisesRegex(QuantizeError, "batch_dims=.1,. must be consecutive leading dimensions"):
            QDenseGeneral(8, batch_dims=(1,), scheme=W4).init(KEY, jnp.ones((2, 3, 64)))
