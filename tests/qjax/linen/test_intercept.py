"""Unmodified linen models on quantized params: what they compute is what Flax computes on the dequantized ones."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import qjax
from qjax import linen as qlinen
from qjax.convert import quantize
from qjax.errors import BackendError, QTensorError
from qjax.qtensor import is_qtensor
from qjax.rules import Rule
from qjax.schemes import NF4, W4A16

KEY = jax.random.key(0)
W4 = W4A16(group_size=32)


def floats(variables):
    """The variables with dequantized kernels."""
    return jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, variables, is_leaf=is_qtensor)


def kernels(variables) -> int:
    """How many QTensors there are."""
    return sum(map(is_qtensor, jax.tree.leaves(variables, is_leaf=is_qtensor)))


def close(got, want) -> None:
    """Equal to float32 sums of a few hundred terms, element by element against the largest."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * float(jnp.abs(b).max()))


class Block(nn.Module):
    """A transformer block of Flax's own parts."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        x = x + h
        h = nn.Einsum((self.width, 2, 64), "BTD,DGH->GBTH", name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(self.width, name="down")(nn.silu(h[0]) * h[1]), None


class TiedModel(nn.Module):
    """Tokens to logits: a scan over rematerialized blocks between an embedding and itself."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(50, 64, name="embed")
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(embed(ids), None)
        return embed.attend(nn.LayerNorm()(x))


IDS = jnp.array([[1, 2, 3], [4, 5, 49]])


class WholeModelTest(parameterized.TestCase):
    @parameterized.parameters(W4, NF4(), "w8a16", "fp8")
    def test_a_tied_scanned_rematerialized_transformer(self, scheme):
        model = TiedModel()
        params = model.init(KEY, IDS)["params"]
        q = quantize(params, [("embed", scheme), (".*", scheme)], model, (IDS,))
        self.assertEqual(kernels(q), 7)  # query, key, value, out, up, down, embed
        self.assertEqual(q["blocks"]["attention"]["out"]["kernel"].shape, (3, 4, 16, 64))
        self.assertEqual(q["blocks"]["attention"]["query"]["kernel"].stack_shape, (3,))
        got = jax.jit(lambda p, ids: qlinen.apply(model, {"params": p}, ids))(q, IDS)
        close(got, model.apply({"params": floats(q)}, IDS))
        self.assertEqual(got.dtype, jnp.float32)

    def test_two_lines(self):
        model = TiedModel()
        params = model.init(KEY, IDS)["params"]
        q = quantize(params, "w8a16", model, (IDS,))
        y = qlinen.apply(model, {"params": q}, IDS)
        base = model.apply({"params": params}, IDS)
        self.assertLess(float(jnp.linalg.norm(y - base) / jnp.linalg.norm(base)), 0.02)
        self.assertGreater(float(jnp.abs(y - base).max()), 0)

    def test_bytes_of_every_kernel_shrink_as_promised(self):
        params = TiedModel().init(KEY, IDS)["params"]
        q = quantize(params, W4, TiedModel(), (IDS,))
        # 4 bits, padded from K = 64 to 128 codes, and a float16 scale for each 32.
        self.assertEqual(q["blocks"]["up"]["kernel"].nbytes, 3 * 128 * (128 // 2 + 2 * 2))


class Mlp(nn.Module):
    """Two dense layers, the first without a bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(64, use_bias=False)(x))
        return nn.Dense(8)(x)


X = jax.random.normal(KEY, (4, 64))
MLP = Mlp()
Q = quantize(MLP.init(KEY, X), W4)


class TransformTest(parameterized.TestCase):
    def test_grad_with_respect_to_inputs(self):
        def loss(apply, variables):
            return lambda x: (apply(variables, x) ** 2).sum()

        got = jax.jit(jax.grad(loss(lambda v, x: qlinen.apply(MLP, v, x), Q)))(X)
        close(got, jax.grad(loss(MLP.apply, floats(Q)))(X))

    def test_grad_with_respect_to_biases_beside_the_kernels(self):
        bias = Q["params"]["Dense_1"]["bias"]

        def loss(apply, variables):
            def of(bias):
                inner = variables["params"]
                tree = {**inner, "Dense_1": {**inner["Dense_1"], "bias": bias}}
                return (apply({"params": tree}, X) ** 2).sum()

            return of

        got = jax.grad(loss(lambda v, x: qlinen.apply(MLP, v, x), Q))(bias)
        close(got, jax.grad(loss(MLP.apply, floats(Q)))(bias))

    def test_vmap_over_inputs(self):
        x = jax.random.normal(KEY, (5, 4, 64))
        close(jax.vmap(lambda x: qlinen.apply(MLP, Q, x))(x), MLP.apply(floats(Q), x))

    def test_vmap_over_stacked_params(self):
        layer = nn.Dense(8)
        params = jax.vmap(lambda k: layer.init(k, X))(jax.random.split(KEY, 3))
        q = quantize(params, Rule(".*", W4, axis=(1,), stacked=(0,)))
        x = jax.random.normal(KEY, (3, 4, 64))
        close(jax.vmap(lambda p, x: qlinen.apply(layer, p, x))(q, x), jax.vmap(layer.apply)(floats(q), x))

    @parameterized.parameters(0, None)
    def test_layers_stacked_by_nn_vmap(self, in_axes):
        model = nn.vmap(Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, axis_size=3)()
        x = jax.random.normal(KEY, (3, 4, 64))
        params = model.init(KEY, x)
        q = quantize(params, W4, model, (x,))
        self.assertEqual(q["params"]["Dense_1"]["kernel"].shape, (3, 64, 8))
        close(qlinen.apply(model, q, x), model.apply(floats(q), x))

    def test_a_scan_inside_a_vmap(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return x + nn.DenseGeneral((4, 16), name="split")(x).reshape(x.shape), None

        make = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        model = nn.vmap(nn.scan(Layer, length=2, **make), in_axes=(0, None), axis_size=3, **make)()
        x = jax.random.normal(KEY, (3, 5, 64))
        q = quantize(model.init(KEY, x, None), W4, model, (x, None))
        self.assertEqual(q["params"]["split"]["kernel"].stack_shape, (3, 2))
        close(qlinen.apply(model, q, x, None)[0], model.apply(floats(q), x, None)[0])

    def test_a_layer_that_a_scan_shares(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return nn.tanh(nn.Dense(64)(x)), None

        model = nn.scan(Layer, variable_broadcast="params", split_rngs={"params": False}, length=3)()
        q = quantize(model.init(KEY, X, None), W4, model, (X, None))
        self.assertEqual(q["params"]["Dense_0"]["kernel"].shape, (64, 64))
        close(qlinen.apply(model, q, X, None)[0], model.apply(floats(q), X, None)[0])

    @chex.variants(with_jit=True, without_jit=True)
    def test_batched_dense_general(self):
        layer = nn.DenseGeneral((2, 6), axis=(-2, -1), batch_dims=(0,))
        x = jax.random.normal(KEY, (3, 5, 4, 16))
        q = quantize(layer.init(KEY, x), W4, layer, (x,))
        self.assertEqual(q["params"]["kernel"].stack_shape, (3,))
        close(self.variant(lambda v, x: qlinen.apply(layer, v, x))(q, x), layer.apply(floats(q), x))


class PassingThroughTest(parameterized.TestCase):
    def test_float_params_run_as_they_always_did(self):
        model = TiedModel()
        variables = model.init(KEY, IDS)
        chex.assert_trees_all_equal(qlinen.apply(model, variables, IDS), model.apply(variables, IDS))

    def test_init_under_interception_is_init(self):
        with qlinen.intercept():
            got = MLP.init(KEY, X)
        chex.assert_trees_all_equal(got, MLP.init(KEY, X))

    def test_a_mixed_model(self):
        q = quantize(MLP.init(KEY, X), {"Dense_1": W4})
        self.assertEqual(kernels(q), 1)
        close(qlinen.apply(MLP, q, X), MLP.apply(floats(q), X))

    def test_methods_and_mutable_collections_are_those_of_apply(self):
        model = nn.Embed(50, 64)
        q = quantize(model.init(KEY, IDS), {".{0}": W4}, model, (IDS,))
        close(qlinen.apply(model, q, X, method="attend"), model.apply(floats(q), X, method="attend"))
        _, state = qlinen.apply(MLP, Q, X, capture_intermediates=True, mutable=["intermediates"])
        self.assertIn("Dense_0", state["intermediates"])

    def test_a_subclass_that_calls_super_is_served(self):
        class Doubled(nn.Dense):
            def __call__(self, inputs: jax.Array) -> jax.Array:
                return 2 * super().__call__(inputs)

        q = quantize(Doubled(8).init(KEY, X), W4, Doubled(8), (X,))
        self.assertEqual(kernels(q), 1)
        close(qlinen.apply(Doubled(8), q, X), 2 * nn.Dense(8).apply(floats(q), X))

    def test_recurrent_cells_made_of_dense_layers_are_served(self):
        model = nn.RNN(nn.LSTMCell(64))
        x = jax.random.normal(KEY, (2, 5, 64))
        q = quantize(model.init(KEY, x), W4, model, (x,))
        self.assertEqual(kernels(q), 8)
        close(qlinen.apply(model, q, x), model.apply(floats(q), x))

    def test_a_cell_that_fuses_its_kernels_is_left_alone_by_its_model(self):
        model = nn.RNN(nn.OptimizedLSTMCell(64))
        x = jax.random.normal(KEY, (2, 5, 64))
        params = model.init(KEY, x)
        with self.assertRaisesRegex(qjax.errors.RuleError, "matches nothing"):
            quantize(params, W4, model, (x,))
        with self.assertRaisesRegex(QTensorError, r"cell/\w+: DenseParams cannot run on a quantized kernel"):
            qlinen.apply(model, quantize(params, W4), x)


class ErrorTest(parameterized.TestCase):
    def test_a_jitted_apply_keeps_the_interception_of_its_first_trace(self):
        apply = jax.jit(MLP.apply)
        with qlinen.intercept():
            want = apply(Q, X)
        chex.assert_trees_all_equal(apply(Q, X), want)  # as documented: traced once, inside the context

    def test_without_interception_flax_refuses(self):
        with self.assertRaises(flax.errors.ScopeParamShapeError):
            MLP.apply(Q, X)

    @parameterized.parameters("dot_general", "dot_general_cls")
    def test_a_product_of_ones_own_is_refused_by_its_path(self, name):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                own = jax.lax.dot_general if name == "dot_general" else lambda: jax.lax.dot_general
                wrapped = (lambda *a, **k: own(*a, **k)) if name == "dot_general" else own
                return nn.Dense(8, name="up", **{name: wrapped})(x)

        q = quantize(Model().init(KEY, X), W4)
        with self.assertRaisesRegex(NotImplementedError, f"^up: {name}=.*leave this layer alone"):
            qlinen.apply(Model(), q, X)

    def test_jaxs_own_product_is_none_of_ones_own(self):
        layer = nn.Dense(8, dot_general=jax.lax.dot_general)
        q = quantize(layer.init(KEY, X), W4)
        close(qlinen.apply(layer, q, X), layer.apply(floats(q), X))

    def test_the_backend_is_for_every_layer(self):
        with qlinen.intercept(backend="xla"):
            close(MLP.apply(Q, X), MLP.apply(floats(Q), X))
        with self.assertRaisesRegex(BackendError, "nonsense"), qlinen.intercept(backend="nonsense"):
            MLP.apply(Q, X)
