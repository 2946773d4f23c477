"""The dense weight that a kernel writes, and the product by it, interpreted on a CPU: against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels import dense_dot
from pallas_kernels.triton import dequantize_dot

# scheme, (K, N), largest error of a value in units of bfloat16's rounding: the scale's, the product's, a table's
CASES = [
    ("w4a16", (256, 40), 2.1),
    ("w4a16", (384, 33), 2.1),
    ("w4a16:group_size=32,symmetric=false", (320, 72), 2.1),
    ("w4a16:group_size=256", (512, 32), 2.1),
    ("w4a16:group_size=tensor", (256, 33), 0.001),
    ("w3a16:group_size=64", (192, 40), 2.1),
    ("w5a16:symmetric=false", (256, 40), 2.1),
    ("mxfp4", (256, 40), 0.0),
    ("nf4", (192, 40), 3.1),
]
UNIT = 2.0**-8


def weight(scheme: str, k: int, n: int) -> qjax.QTensor:
    return qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme)


def call(x: jax.Array, w: qjax.QTensor, **options) -> jax.Array:
    parts = dict(zero_point=w.zero_point, global_scale=w.global_scale, interpret=True)
    group = w.scheme.block[1] or w.in_features
    return dequantize_dot.matmul(x, w.packed, w.scale, weight=w.scheme.weight, group=group, **parts, **options)


@pytest.mark.parametrize(("scheme", "shape", "allowed"), CASES, ids=lambda v: str(v))
def test_every_value_is_within_its_roundings(scheme: str, shape: tuple, allowed: float):
    k, n = shape
    w = weight(scheme, k, n)
    found = dequantize_dot.dequantize(
        w.packed, w.scale, w.zero_point, weight=w.scheme.weight, group=w.scheme.block[1] or k, k=k,
        dtype=jnp.bfloat16, interpret=True,
    )  # fmt: skip
    exact = np.asarray(w.dequantize(), np.float64).T
    if w.scale.size == 1:
        exact = exact / np.asarray(w.scale, np.float64)
    assert found.shape == (n, k)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= allowed * UNIT * np.abs(exact) + 1e-30).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4", "w4a16:group_size=tensor"])
def test_a_product_is_that_of_the_dequantized_weight(scheme: str, transposed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense_dot, "SCRATCH", 128 * 256 * 2)  # two ranges of rows and a rest
    w = weight(scheme, 256, 300)
    x = jax.random.normal(jax.random.key(1), (20, 300 if transposed else 256)).astype(jnp.bfloat16)
    options = {} if transposed else dict(bias=jnp.linspace(-1, 1, 300), activation=jax.nn.silu)
    y = np.asarray(jax.jit(functools.partial(call, transposed=transposed, **options))(x, w), np.float64)
    dense = np.asarray(w.dequantize(), np.float64)
    exact = np.asarray(x, np.float64) @ (dense.T if transposed else dense)
    if not transposed:
        exact = exact + np.asarray(options["bias"], np.float64)
        exact = exact / (1 + np.exp(-exact))
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert np.linalg.norm(y - exact) <= 1.9 * rounding
