"""A quantized module under what nnx and orbax do to modules."""

import copy
import tempfile

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized
from flax import nnx

from qjax.nnx import QEmbed, QLinear, QParam, quantize

SIZE = 64


def model_of(seed: int, scheme: str = "w4a16:group_size=32") -> nnx.Module:
    """Two quantized layers around a norm."""
    rngs = nnx.Rngs(seed)
    layers = nnx.Linear(SIZE, SIZE, rngs=rngs), nnx.LayerNorm(SIZE, rngs=rngs), nnx.Linear(SIZE, 8, rngs=rngs)
    return quantize(nnx.Sequential(*layers), scheme)


class TransformsTest(parameterized.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.model = model_of(0)
        self.x = jax.random.normal(jax.random.key(3), (4, SIZE))
        self.y = self.model(self.x)

    def check(self, model: nnx.Module) -> None:
        chex.assert_trees_all_close(model(self.x), self.y, rtol=1e-6)

    def test_jit(self) -> None:
        traced = nnx.jit(chex.assert_max_traces(lambda m, x: m(x), n=1))
        chex.assert_trees_all_close(traced(self.model, self.x), self.y, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(traced(self.model, self.x), self.y, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(jax.jit(lambda m, x: m(x))(self.model, self.x), self.y, rtol=1e-5, atol=1e-6)

    def test_split_and_merge(self) -> None:
        graphdef, frozen, rest = nnx.split(self.model, QParam, ...)
        assert {type(v) for _, v in nnx.to_flat_state(frozen)} == {QParam}
        self.check(nnx.merge(graphdef, frozen, rest))

    def test_clone_and_deepcopy(self) -> None:
        self.check(nnx.clone(self.model))
        self.check(copy.deepcopy(self.model))

    def test_update_with_a_state_or_a_pure_dict(self) -> None:
        other = model_of(1)
        nnx.update(other, nnx.state(self.model))
        self.check(other)
        state = nnx.state(model_of(1))
        nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(self.model)))
        nnx.update(other := model_of(2), state)
        self.check(other)

    def test_eval_shape(self) -> None:
        abstract = nnx.eval_shape(lambda: model_of(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(abstract), nnx.state(self.model))
        assert nnx.graphdef(abstract) == nnx.graphdef(self.model)
        y = nnx.eval_shape(lambda m, x: m(x), self.model, self.x)
        assert (y.shape, y.dtype) == (self.y.shape, self.y.dtype)

    def test_orbax_restores_into_an_abstract_target(self) -> None:
        graphdef, target = nnx.split(nnx.eval_shape(lambda: model_of(1)))
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(f"{folder}/state", nnx.state(self.model))
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(f"{folder}/state", target)
        chex.assert_trees_all_equal(restored, nnx.state(self.model))
        self.check(nnx.merge(graphdef, restored))

    def test_grad_and_optimizers_pass_frozen_kernels_by(self) -> None:
        def loss(model: nnx.Module) -> jax.Array:
            return jnp.sum(model(self.x) ** 2)

        grads = nnx.grad(loss)(self.model)
        assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"bias", "scale"}
        chex.assert_trees_all_close(grads["layers"][2]["bias"].get_value(), 2 * self.y.sum(0), rtol=1e-4)
        frozen = nnx.to_pure_dict(nnx.state(self.model, QParam))
        optimizer = nnx.Optimizer(self.model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)
        before = loss(self.model)
        optimizer.update(self.model, grads)
        assert loss(self.model) < before
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(self.model, QParam)), frozen)

    def test_grad_of_x_is_that_of_the_dequantized_kernel(self) -> None:
        layer = QLinear(SIZE, 8, scheme="nf4", rngs=nnx.Rngs(0))
        grad = jax.grad(lambda x: layer(x).sum())(self.x)
        kernel = layer.kernel.get_value().dequantize()
        chex.assert_trees_all_close(grad, jnp.ones((4, 8)) @ kernel.T, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(("fp8", False, "no gradient"), ("w8a16", True, "no gradient"), ("w8a16", False, "int8"))
    def test_a_gradient_of_codes_is_an_error(self, scheme: str, allow_int: bool, message: str) -> None:
        model = model_of(0, scheme)
        with pytest.raises(TypeError, match=message):
            nnx.grad(lambda m: m(self.x).sum(), argnums=nnx.DiffState(0, QParam), allow_int=allow_int)(model)

    def test_remat_and_vmap(self) -> None:
        remat = nnx.remat(lambda m, x: m(x))
        chex.assert_trees_all_close(remat(self.model, self.x), self.y, rtol=1e-6)
        mapped = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
        chex.assert_trees_all_close(mapped(self.model, self.x), self.y, rtol=1e-5, atol=1e-6)

    def test_a_layer_prints_its_kernel_in_one_line(self) -> None:
        assert "QTensor(w4a16:group_size=32, shape=(64, 64), dtype=float32" in repr(self.model)

    def test_an_embedding_survives_jit_and_split(self) -> None:
        embed = QEmbed(20, SIZE, scheme="w8a16", rngs=nnx.Rngs(0))
        expected = embed(jnp.arange(5))
        chex.assert_trees_all_equal(nnx.jit(lambda m, i: m(i))(embed, jnp.arange(5)), expected)
        chex.assert_trees_all_equal(nnx.merge(*nnx.split(embed))(jnp.arange(5)), expected)


def test_a_linen_layer_crosses_the_bridge() -> None:
    from qjax.linen import QDense

    dense = QDense(8, scheme="w4a16:group_size=32")
    x = jnp.ones((2, SIZE))
    bridged = nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(x)
    params = {"kernel": bridged.kernel.get_value(), "bias": bridged.bias.get_value()}
    chex.assert_trees_all_equal(bridged(x), dense.apply({"params": params}, x))
