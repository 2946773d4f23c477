"""Products by a gate and a factor merged into one weight: f(gate) * up, against float64 and under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import QTensorError

K, N = 256, 64
X = jax.random.normal(jax.random.key(0), (5, K))
GATE, UP = (jax.random.normal(jax.random.key(i), (K, N)) * 0.1 for i in (1, 2))
BIAS, RESIDUAL = jnp.linspace(-1, 1, 2 * N), jnp.full((5, N), 0.5)


def merged(scheme: str) -> tuple[qjax.QTensor, np.ndarray, np.ndarray]:
    """The merged weight, and the two that it holds in float64."""
    parts = [qjax.quantize_array(w, scheme) for w in (GATE, UP)]
    return qjax.concat_rows(parts), *(np.asarray(w.dequantize(), np.float64) for w in parts)


def exact(gate: np.ndarray, up: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    g, u = (np.asarray(x, np.float64) @ w + np.asarray(b) for w, b in ((gate, BIAS[:N]), (up, BIAS[N:])))
    return g / (1 + np.exp(-g)) * u + np.asarray(RESIDUAL)


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4", "w8a8_int8"])
def test_a_merged_weight_is_gate_and_up(scheme: str):
    w, gate, up = merged(scheme)
    y = qjax.matmul(X, w, BIAS, activation="silu_mul", residual=RESIDUAL)
    assert y.shape == (5, N) and y.dtype == X.dtype
    np.testing.assert_allclose(y, exact(gate, up), rtol=0, atol=0.2 if scheme == "w8a8_int8" else 2e-4)


def test_the_result_is_rounded_once():
    w, gate, up = merged("w4a16")
    y = np.asarray(
        qjax.matmul(X, w, BIAS, activation="silu_mul", residual=RESIDUAL, out_dtype=jnp.bfloat16), np.float64
    )
    right = exact(gate, up)
    rounding = np.linalg.norm(np.asarray(jnp.asarray(right, jnp.bfloat16), np.float64) - right)
    assert np.linalg.norm(y - right) <= 1.01 * rounding


def test_gradients_are_those_of_two_products():
    w, gate, up = merged("w4a16")

    def dense(x, bias):
        g, u = x @ gate + bias[:N], x @ up + bias[N:]
        return (jax.nn.silu(g) * u).sum()

    def ours(x, bias):
        return qjax.matmul(x, w, bias, activation="silu_mul").sum()

    for found, right in zip(jax.grad(ours, (0, 1))(X, BIAS), jax.grad(dense, (0, 1))(X, BIAS), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-3)


def test_stacks_and_batches_are_gated_one_by_one():
    w, *_ = merged("w4a16")
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    one = qjax.matmul(X, w, activation="gelu_tanh_mul")
    for y in qjax.matmul(jnp.stack([X, X]), stack, activation="gelu_tanh_mul"):
        np.testing.assert_allclose(y, one, rtol=1e-5, atol=1e-5)
    for y in jax.vmap(lambda x: qjax.matmul(x, w, activation="gelu_tanh_mul"))(jnp.stack([X, X])):
        np.testing.assert_allclose(y, one, rtol=1e-5, atol=1e-5)


def test_gates_and_factors_may_lie_on_different_devices():
    w, gate, up = merged("w4a16")
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,))
    cut = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("t"))), w)
    y = jax.jit(lambda x, w: qjax.matmul(x, w, BIAS, activation="silu_mul", residual=RESIDUAL))(X, cut)
    np.testing.assert_allclose(y, exact(gate, up), rtol=0, atol=2e-4)


def test_an_odd_number_of_outputs_and_a_residual_of_both_halves_are_errors():
    w, *_ = merged("w4a16")
    with pytest.raises(QTensorError, match=r"residual of shape \(5, 128\); the product has \(5, 64\)"):
        qjax.matmul(X, w, activation="silu_mul", residual=jnp.ones((5, 2 * N)))
    with pytest.raises(QTensorError, match="'silu_mul' takes gates and as many factors; the weight has 63 outputs"):
        qjax.matmul(X, qjax.quantize_array(GATE[:, :63], "w4a16"), activation="silu_mul")
