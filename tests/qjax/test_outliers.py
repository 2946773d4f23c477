"""LLM.int8's decomposition: which columns leave x, and products with what is left against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import SchemeError
from qjax.outliers import capacity, split_outliers
from qjax.scheme_json import scheme_from_dict, scheme_to_dict

K, N, M = 1024, 48, 9
COLUMNS = np.array([3, 77, 300, 511])
X = jax.random.normal(jax.random.key(0), (M, K)).at[5, COLUMNS].set(jnp.array([20.0, -30.0, 40.0, -50.0]))
KERNEL = jax.random.normal(jax.random.key(1), (K, N)) * 0.03


def relative(y: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def exact(w: qjax.QTensor, x: jax.Array = X) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)


def by_formula(w: qjax.QTensor, x: jax.Array = X, threshold: float = 6.0) -> np.ndarray:
    """The formula in float64 numpy, with room for all columns."""
    x, dense = np.asarray(x, np.float64), np.asarray(w.dequantize(jnp.float32), np.float64)
    out = np.abs(x).max(axis=0) >= threshold
    rest = np.where(out, 0, x)
    scale = np.float64(np.float32(np.abs(rest).max(axis=1, keepdims=True)) / np.float32(127))
    return np.round(rest / scale).clip(-128, 127) * scale @ dense + np.where(out, x, 0) @ dense


def test_columns_beyond_the_threshold_leave_x():
    split = split_outliers(X, 6.0)
    kept = np.asarray(split.columns)[np.asarray(split.columns) < K]
    assert set(kept) == set(COLUMNS)
    np.testing.assert_array_equal(split.rest[:, COLUMNS], 0)
    np.testing.assert_array_equal(split.outlier_x[:, : len(kept)], X[:, kept])
    np.testing.assert_array_equal(split.outlier_x[:, len(kept) :], 0)
    np.testing.assert_array_equal(split.rest.at[:, kept].set(X[:, kept]), X)


def test_the_largest_leave_where_there_is_little_room():
    split = split_outliers(X, 6.0, room=2)
    assert set(np.asarray(split.columns)) == set(COLUMNS[np.argsort(-np.abs(X[5, COLUMNS]))[:2]])
    assert (capacity(4096), capacity(1024), capacity(100), capacity(8)) == (64, 16, 16, 8)


@pytest.mark.parametrize("options", ["", ",symmetric=false", ",group_size=128", ",group_size=tensor"])
def test_a_product_is_the_formulas(options: str):
    w = qjax.quantize_array(KERNEL, f"w8a8_int8:outliers=6{options}")
    y = qjax.matmul(X, w)
    assert relative(y, by_formula(w)) < 1e-4  # a code half way may fall to either side
    plain = qjax.matmul(X, qjax.quantize_array(KERNEL, f"w8a8_int8:mode=dynamic{options}"))
    assert relative(y, exact(w)) < 0.5 * relative(plain, exact(w))


def test_what_surrounds_a_product_follows_both_parts():
    w = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=6")
    bias, residual = jnp.linspace(-1, 1, N), jnp.ones((M, N))
    y = qjax.matmul(X, w, bias, activation="relu", residual=residual)
    assert relative(y, np.maximum(by_formula(w) + np.asarray(bias), 0) + 1) < 1e-4


def test_x_in_sixteen_bits_keeps_its_outliers():
    w, x = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=6"), X.astype(jnp.bfloat16)
    assert relative(qjax.matmul(x, w, out_dtype=jnp.float32), by_formula(w, x)) < 0.003  # w rounded to bfloat16 there


def test_no_outliers_change_nothing():
    w = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=1000")
    plain = dataclasses.replace(w, scheme=qjax.W8A8Int8())
    np.testing.assert_array_equal(qjax.matmul(X, w), qjax.matmul(X, plain))
    assert qjax.matmul(X[:0], w).shape == (0, N)


def test_stacks_and_batches_have_columns_of_their_own():
    w = qjax.quantize_array(jnp.stack([KERNEL, KERNEL[::-1]]), "w8a8_int8:outliers=6")
    x = jnp.stack([X, X[:, ::-1]])
    ones = [qjax.matmul(x[i], jax.tree.map(lambda a, i=i: a[i], w)) for i in range(2)]
    np.testing.assert_allclose(qjax.matmul(x, w), jnp.stack(ones), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(qjax.matmul)(x, w), jnp.stack(ones), rtol=1e-4, atol=1e-4)


def test_the_gradient_passes_both_parts_unchanged():
    w = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=6")
    dx = jax.grad(lambda x: qjax.matmul(x, w).sum())(X)
    np.testing.assert_allclose(dx[0], w.dequantize().sum(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("of_w", "of_x"),
    [(P(None, "t"), P()), (P("t", None), P()), (P("t", None), P(None, "t")), (P(), P("t")), (P("t", None), P("t"))],
    ids=["n", "k", "k of both", "rows", "k and rows"],
)
def test_x_and_weight_may_be_cut_on_a_mesh(kind: AxisType, of_w: P, of_x: P):
    w, x = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=6"), X[:8]
    bias, residual = jnp.linspace(-1, 1, N), jnp.ones((8, N))
    mesh = jax.make_mesh((4,), ("t",), axis_types=(kind,))
    cut = qjax.sharding.shard(w, mesh, of_w)
    y = jax.jit(qjax.matmul)(jax.device_put(x, NamedSharding(mesh, of_x)), cut, bias, residual=residual)
    assert relative(y, by_formula(w, x) + np.asarray(bias) + 1) < 1e-4


def test_batches_and_gradients_pass_an_explicit_mesh():
    w = qjax.quantize_array(KERNEL, "w8a8_int8:outliers=6")
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Explicit,))
    cut, x = qjax.sharding.shard(w, mesh, P(None, "t")), jax.device_put(X, NamedSharding(mesh, P()))
    rows = jax.vmap(lambda one: qjax.matmul(one[None], cut)[0])(x)
    assert relative(rows, by_formula(w)) < 0.02  # each row has outliers of its own
    with jax.set_mesh(mesh):  # which the gradient of a sum has to be told of
        dx = jax.grad(lambda x: qjax.matmul(x, cut).sum())(x)
    np.testing.assert_allclose(dx[0], w.dequantize().sum(axis=1), rtol=1e-4, atol=1e-5)


def test_the_scheme_is_written_and_read():
    scheme = qjax.W8A8Int8(outliers=6)
    assert str(scheme) == "w8a8_int8:outliers=6.0" and qjax.parse_scheme(str(scheme)) == scheme
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme
    for wrong in (0, -1.0, True, "6"):
        with pytest.raises(SchemeError, match="outliers="):
            qjax.W8A8Int8(outliers=wrong)
    with pytest.raises(SchemeError, match="mode='static'; allowed: 'dynamic'"):
        qjax.W8A8Int8(outliers=6, mode="static")
    fields = scheme_to_dict(scheme)
    with pytest.raises(SchemeError, match="activation"):
        scheme_from_dict(fields | {"activation": fields["activation"] | {"outliers": -1.0}})
