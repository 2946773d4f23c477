"""The Triton kernels' arithmetic, interpreted on a CPU: every format they read, shapes with edges, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels.triton import matmul_8bit, matmul_packed

# scheme, (M, K, N), error allowed against rounding the exact result: tables are rounded to x's type first.
CASES = [
    ("w4a16", (3, 256, 40), 1.05),
    ("w4a16:group_size=-1,symmetric=false", (17, 300, 70), 1.05),
    ("w4a16:group_size=64", (1, 384, 33), 1.05),
    ("w4a16:group_size=32,symmetric=false", (5, 256, 32), 1.05),
    ("w4a16:group_size=16", (5, 256, 32), 1.05),
    ("w4a16:group_size=256", (2, 256, 64), 1.05),
    ("w4a16:group_size=tensor", (2, 256, 64), 1.05),
    ("mxfp4", (3, 256, 48), 1.05),
    ("nvfp4", (3, 256, 48), 1.05),
    ("w6a16", (2, 384, 40), 1.05),
    ("w5a16:symmetric=false", (2, 256, 40), 1.05),
    ("w3a16:symmetric=true", (2, 256, 33), 1.05),
    ("w3a16:symmetric=false,group_size=64", (2, 320, 33), 1.05),
    ("w2a16", (2, 256, 40), 1.05),
    ("nf4", (2, 256, 48), 1.7),
    ("fp4", (2, 256, 48), 1.7),
    ("higgs:hadamard_size=1", (2, 256, 48), 1.7),
    ("w4a16:group_size=32", (9, 320, 40), 1.05),
    ("w4a16:group_size=16,symmetric=false", (9, 208, 40), 1.05),
    ("w5a16:group_size=32", (9, 256, 40), 1.05),
    ("nf4", (18, 320, 40), 1.7),
    ("mxfp4", (9, 288, 40), 1.05),
    ("nvfp4", (9, 272, 40), 1.05),
    ("w8a16", (3, 256, 40), 1.05),
    ("w8a16:symmetric=false", (17, 300, 70), 1.05),
    ("w8a16:group_size=128", (1, 384, 33), 1.05),
    ("fp8", (5, 256, 32), 1.05),
    ("fp8:granularity=block", (5, 256, 200), 1.05),
    ("mxfp8", (2, 256, 48), 1.05),
]


@pytest.mark.parametrize(("scheme", "shape", "allowed"), CASES, ids=lambda v: str(v))
def test_an_interpreted_kernel_is_within_its_error_of_float64(scheme: str, shape: tuple, allowed: float):
    m, k, n = shape
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme)
    x = jax.random.normal(jax.random.key(1), (m, k)).astype(jnp.bfloat16)
    kernel = matmul_packed if w.is_packed else matmul_8bit
    block_n, group = w.scheme.block[0] or n, w.scheme.block[1] or k
    options = dict(weight=w.scheme.weight, group=group, zero_point=w.zero_point, sms=4, interpret=True)
    if w.is_packed:
        options["global_scale"] = w.global_scale
    else:
        options["block_n"] = block_n
    y = np.asarray(kernel.matmul(x, w.packed, w.scale, **options), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert np.linalg.norm(y - exact) <= allowed * rounding


def test_what_a_kernel_cannot_do_is_said():
    facts = dict(weight="int4", group=48, block_n=1, x_dtype="bfloat16", x_format=None, scale_dtype="float16")
    assert "groups of 48" in matmul_packed.unsupported(1, 96, 8, **facts, transposed=False)
    assert "transpose" in matmul_packed.unsupported(1, 96, 8, **facts, transposed=True)


@pytest.mark.parametrize("scheme", ["w4a16:symmetric=false", "w3a16:symmetric=false"])
def test_zero_points_that_are_no_integers_meet_sums_of_x(scheme: str):
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 40)) * 0.02, scheme)
    w = dataclasses.replace(w, zero_point=w.zero_point.astype(jnp.float32) + 0.3)
    for m in (2, 17):
        x = jax.random.normal(jax.random.key(1), (m, 256)).astype(jnp.bfloat16)
        options = dict(weight=w.scheme.weight, group=w.scheme.block[1], zero_point=w.zero_point)
        y = np.asarray(matmul_packed.matmul(x, w.packed, w.scale, **options, interpret=True), np.float64)
        exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
        rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
        assert np.linalg.norm(y - exact) <= 1.05 * rounding
