"""One product under every transformation, against the dense product of the dequantized weight in float64."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax

K, N = 512, 256
X = jax.random.normal(jax.random.key(1), (8, K))
BATCH = X.reshape(4, 2, K)


@functools.cache
def weight(scheme: str, *stack: int) -> qjax.QTensor:
    return qjax.quantize_array(jax.random.normal(jax.random.key(len(stack)), (*stack, K, N)) * 0.02, scheme)


def f64(a: object) -> np.ndarray:
    return np.asarray(a.dequantize() if isinstance(a, qjax.QTensor) else a, np.float64)


def close(got: jax.Array, want: np.ndarray, bound: float = 2e-6) -> None:
    error = np.linalg.norm(f64(got) - want) / np.linalg.norm(want)
    assert got.shape == want.shape and error < bound, (got.shape, want.shape, error)


SCHEMES = (
    "w4a16",
    "w4a16:symmetric=false",
    "w3a16",
    "w8a16",
    "fp8:granularity=block",
    "nf4:double_quant=true",
    "nvfp4",
)


def square(x: jax.Array, w: qjax.QTensor) -> jax.Array:
    return (qjax.matmul(x, w) ** 2).sum()


class TransformTest(chex.TestCase, parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SCHEMES)
    def test_product(self, scheme: str):
        close(self.variant(qjax.matmul)(X, weight(scheme)), f64(X) @ f64(weight(scheme)))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SCHEMES)
    def test_gradient_is_the_transposed_product(self, scheme: str):
        w = f64(weight(scheme))
        close(self.variant(jax.grad(square))(X, weight(scheme)), 2 * (f64(X) @ w) @ w.T)

    @parameterized.parameters(*SCHEMES)
    def test_vmap_over_x_weights_and_both(self, scheme: str):
        one, four = weight(scheme), weight(scheme, 4)
        w1, w4 = f64(one), f64(four)
        close(jax.vmap(qjax.matmul, (0, None))(BATCH, one), f64(BATCH) @ w1)
        close(jax.vmap(qjax.matmul, (None, 0))(X, four), np.einsum("mk,ekn->emn", f64(X), w4))
        close(jax.vmap(qjax.matmul)(BATCH, four), np.einsum("emk,ekn->emn", f64(BATCH), w4))
        nested = jax.vmap(jax.vmap(qjax.matmul, (0, None)))(BATCH, four)
        close(nested, np.einsum("emk,ekn->emn", f64(BATCH), w4))

    @parameterized.parameters("w4a16", "nf4:double_quant=true")
    def test_vmap_of_grad_and_grad_of_vmap(self, scheme: str):
        four = weight(scheme, 4)
        w = f64(four)
        y = np.einsum("emk,ekn->emn", f64(BATCH), w)
        close(jax.vmap(jax.grad(square))(BATCH, four), 2 * np.einsum("emn,ekn->emk", y, w))
        shared = jax.grad(lambda x: (jax.vmap(qjax.matmul, (None, 0))(x, four) ** 2).sum())(X)
        y = np.einsum("mk,ekn->emn", f64(X), w)
        close(shared, 2 * np.einsum("emn,ekn->mk", y, w))

    def test_second_derivative(self):
        w = f64(weight("w4a16"))
        twice = jax.grad(lambda x: (jax.grad(square)(x, weight("w4a16")) ** 2).sum())(X)
        close(twice, 8 * f64(X) @ w @ w.T @ w @ w.T)

    def test_epilogue_gradients_are_jax_s_own(self):
        w = weight("w4a16")
        dense = jnp.asarray(f64(w), jnp.float32)
        bias, residual = jax.random.normal(jax.random.key(3), (N,)), jax.random.normal(jax.random.key(4), (8, N))

        def ours(x: jax.Array, b: jax.Array, r: jax.Array) -> jax.Array:
            return (qjax.matmul(x, w, b, activation="silu", residual=r) ** 2).sum()

        def theirs(x: jax.Array, b: jax.Array, r: jax.Array) -> jax.Array:
            return ((jax.nn.silu(x @ dense + b) + r) ** 2).sum()

        got, want = (jax.grad(f, (0, 1, 2))(X, bias, residual) for f in (ours, theirs))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)

    def test_a_bias_for_each_example(self):
        bias, w = jax.random.normal(jax.random.key(3), (8, N)), weight("w4a16")
        got = jax.vmap(lambda x, b: qjax.matmul(x, w, b, activation="relu"))(X, bias)
        close(got, np.maximum(f64(X) @ f64(w) + f64(bias), 0))

    def test_checkpoint_and_scan_slice_a_stack(self):
        square_stack = qjax.quantize_array(jax.random.normal(jax.random.key(2), (3, K, K)) * 0.04, "w4a16")

        @jax.jit
        def run(x: jax.Array, w: qjax.QTensor) -> jax.Array:
            step = jax.checkpoint(lambda c, layer: (qjax.matmul(c, layer), None))
            return jax.lax.scan(step, x, w)[0]

        want = f64(X)
        for layer in f64(square_stack):
            want = want @ layer
        close(run(X, square_stack), want)
        w = f64(square_stack)
        gradient = jax.grad(lambda x: run(x, square_stack).sum())(X)
        close(gradient, np.ones((8, K)) @ w[2].T @ w[1].T @ w[0].T)

    @parameterized.parameters("w8a8_int8", "w8a8_fp8:activation=block", "w8a8_int8:activation=tensor")
    def test_the_gradient_of_quantizing_x_is_the_identity(self, scheme: str):
        w, ct = weight(scheme), jax.random.normal(jax.random.key(5), (8, N))
        close(jax.grad(lambda x: (qjax.matmul(x, w) * ct).sum())(X), f64(ct) @ f64(w).T)

    def test_a_weight_s_gradient_is_an_error(self):
        w = qjax.quantize_array(jnp.ones((K, N)), "w4a16:scale_dtype=float32")
        with self.assertRaisesRegex(TypeError, "QTensor has no gradient"):
            jax.grad(lambda s: qjax.matmul(X, dataclasses.replace(w, scale=s)).sum())(w.scale)

    def test_a_jitted_product_is_traced_once(self):
        f = jax.jit(chex.assert_max_traces(lambda x, w: qjax.matmul(x, w), n=1))
        for seed in range(3):
            f(X + seed, weight("w4a16"))


@pytest.mark.parametrize("cut", ["n", "k"])
def test_inside_a_shard_map_the_local_arrays_are_multiplied(cut: str):
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,))
    w = weight("w4a16")
    spec = P(None, "t") if cut == "n" else P("t", None)
    specs, x_spec, y_spec = qjax.sharding.specs(w, spec, mesh), P(None, spec[0]), P(None, spec[1])

    def local(x: jax.Array, w: qjax.QTensor) -> jax.Array:
        y = qjax.matmul(x, w)
        return jax.lax.psum(y, "t") if cut == "k" else y

    f = jax.shard_map(local, mesh=mesh, in_specs=(x_spec, specs), out_specs=y_spec)
    close(jax.jit(f)(X, w), f64(X) @ f64(w))
    gradient = jax.jit(jax.grad(lambda x: (f(x, w) ** 2).sum()))(X)
    close(gradient, 2 * (f64(X) @ f64(w)) @ f64(w).T)


def test_a_partly_manual_mesh_is_refused_by_name():
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(
        lambda x: qjax.matmul(x, weight("w4a16")), mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    with pytest.raises(NotImplementedError, match="mixed axis types"):
        jax.jit(f)(X)
