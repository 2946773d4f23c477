"""`qjax.matmul` by cuBLASLt's kernels under vmap and on meshes, by value: the handlers on the stand-in library."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_product
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import quantize_call
from qjax.errors import BackendError
from xla_ffi.cublaslt import library

pytestmark = pytest.mark.slow

K, N, M = 512, 256, 8
KERNEL = jax.random.normal(jax.random.key(0), (K, N)) * 0.05
X = jax.random.normal(jax.random.key(1), (M, K))
SCHEMES = ("w8a8_fp8", "w8a8_fp8:granularity=block,activation=block", "w8a8_int8")


@pytest.fixture(autouse=True)
def by_cublaslt(fake_cublaslt, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if on an H200, x quantized by the formula."""
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(library, "version", lambda: 130100)
    monkeypatch.setattr(quantize_call, "choose_quantizer", lambda *_, **__: None)
    with qjax.use(device="h200", backend="cublaslt"):
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_of_x_is_more_rows_of_one_launch(scheme, fake_cublaslt):
    w = qjax.quantize_array(KERNEL, scheme)
    batch = X.reshape(4, 2, K)
    before = fake_cublaslt.FakeMatmuls()
    y = jax.jit(jax.vmap(lambda x: qjax.matmul(x, w, out_dtype=jnp.float32)))(batch)
    assert_product(y.reshape(M, N), X, w)
    assert fake_cublaslt.FakeMatmuls() - before == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stack_of_weights_is_multiplied_one_by_one(scheme, fake_cublaslt):
    ws = [qjax.quantize_array(KERNEL * (1 + i), scheme) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    before = fake_cublaslt.FakeMatmuls()
    y = jax.jit(jax.vmap(lambda w: qjax.matmul(X, w)))(stack).block_until_ready()
    assert fake_cublaslt.FakeMatmuls() - before == 3
    for i, w in enumerate(ws):
        assert_product(y[i], X, w)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("of_w", "of_x"), [(P(None, "t"), P()), (P("t", None), P()), (P(), P("t"))], ids=["columns", "contraction", "rows"]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_mesh_each_device_calls_the_library_for_its_part(scheme, of_w, of_x, kind, fake_cublaslt):
    mesh = jax.make_mesh((2,), ("t",), axis_types=(kind,))
    w = qjax.quantize_array(KERNEL, scheme)
    cut = qjax.sharding.shard(w, mesh, of_w)
    x = jax.device_put(X, NamedSharding(mesh, of_x))
    before = fake_cublaslt.FakeMatmuls()
    y = jax.jit(qjax.matmul)(x, cut)
    assert_product(np.asarray(y), X, w)
    assert fake_cublaslt.FakeMatmuls() - before == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_of_x_multiplies_by_the_dense_transpose(scheme, fake_cublaslt):
    w, x = qjax.quantize_array(KERNEL, scheme), X.astype("bfloat16")
    dy = jax.random.normal(jax.random.key(2), (M, N)).astype("bfloat16")
    before = fake_cublaslt.FakeMatmuls()
    y, backward = jax.vjp(lambda x: qjax.matmul(x, w), x)
    (found,) = jax.block_until_ready((y, *backward(dy)))[1:]
    assert fake_cublaslt.FakeMatmuls() - before == 2
    exact = np.asarray(dy, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    rounding = np.linalg.norm(exact.astype("bfloat16").astype(np.float64) - exact)
    assert np.linalg.norm(np.asarray(found, np.float64) - exact) <= 1.6 * rounding  # of values, and of the result


def test_a_gradient_that_the_library_cannot_make_says_why():
    w = qjax.quantize_array(KERNEL, "w8a8_fp8")
    with pytest.raises(BackendError, match="cannot run 8 x 512 x 256 transposed.*not in float32"):
        jax.grad(lambda x: qjax.matmul(x, w).sum())(X)
