"""The transposed products' arithmetic, interpreted on a CPU, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels.triton import transposed, transposed_8bit

# scheme, (M, K, N), config, error allowed against rounding the exact result: scales and values are rounded too.
CASES = [
    ("w4a16", (33, 256, 200), None, 1.85),
    ("w4a16:group_size=-1,symmetric=false", (17, 300, 70), (16, 32, 2, 1, 2), 1.85),
    ("w4a16:group_size=64,symmetric=false", (5, 512, 130), (16, 64, 3, 1, 2, 2), 1.85),
    ("w4a16:group_size=128,symmetric=false", (5, 512, 130), (16, 64, 1, 1, 2, 2), 1.85),
    ("w4a16:group_size=256", (40, 512, 64), (32, 32, 1, 2, 2, 2), 1.85),
    ("w4a16:group_size=tensor", (20, 256, 64), None, 1.1),
    ("w2a16:group_size=32,symmetric=false", (3, 256, 70), None, 1.85),
    ("w3a16:group_size=128", (3, 384, 70), (16, 16, 1, 1, 2, 2), 1.85),
    ("w5a16:group_size=16", (3, 256, 40), None, 1.85),
    ("w6a16:group_size=32,symmetric=false", (3, 256, 40), (16, 16, 1, 1, 2, 2), 1.85),
    ("mxfp4", (7, 320, 70), None, 1.01),
    ("nvfp4", (7, 256, 70), (16, 32, 1, 1, 2, 2), 1.01),
    ("nf4", (16, 256, 96), None, 2.1),
    ("fp4", (16, 256, 96), None, 2.1),
    ("w8a16", (17, 200, 70), None, 1.7),
    ("w8a16:group_size=128,symmetric=false", (16, 256, 130), (16, 32, 2, 4, 2), 1.7),
    ("fp8:granularity=block", (5, 256, 300), (16, 64, 2, 4, 2), 1.7),
    ("fp8:format=e5m2", (33, 128, 64), None, 1.7),
]


def call(x: jax.Array, w: qjax.QTensor, config: tuple | None = None) -> jax.Array:
    fields = ("tile_m", "tile_n", "split_n", "warps", "stages", "blocks")[: len(config or ())]
    kernel = transposed if w.is_packed else transposed_8bit
    return kernel.matmul(
        x, w.packed, w.scale, weight=w.scheme.weight, group=w.scheme.block[1] or w.in_features,
        block_n=w.scheme.block[0] or w.out_features, zero_point=w.zero_point, global_scale=w.global_scale,
        sms=4, interpret=True,
        config=dict(zip(fields, config, strict=True)) if config else None,
    )  # fmt: skip


@pytest.mark.parametrize(("scheme", "shape", "config", "allowed"), CASES, ids=lambda v: str(v))
def test_an_interpreted_product_is_within_its_error_of_float64(scheme: str, shape: tuple, config, allowed: float):
    m, k, n = shape
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme)
    assert_within(allowed, w, m, config)


def assert_within(
    allowed: float, w: qjax.QTensor, m: int, config: tuple | None = None, dtype: str = "bfloat16"
) -> None:
    n, k = w.out_features, w.in_features
    x = jax.random.normal(jax.random.key(1), (m, n)).astype(dtype)
    y = np.asarray(call(x, w, config), np.float64)[:, :k]
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, dtype), np.float64) - exact)
    assert np.linalg.norm(y - exact) <= allowed * rounding


def test_scales_that_are_powers_of_two_cost_nothing():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 64)), "w4a16")
    w = dataclasses.replace(w, scale=2.0 ** jnp.round(jnp.log2(w.scale.astype(jnp.float32))))
    assert_within(1.01, w, 16)


def test_x_may_be_float16():
    for scheme in ("w4a16:group_size=32,symmetric=false", "nf4"):
        assert_within(
            2.1, qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 96)), scheme), 16, dtype="float16"
        )


def test_zero_points_may_be_floats():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 96)), "w4a16:group_size=64,symmetric=false")
    w = dataclasses.replace(w, zero_point=w.zero_point.astype(jnp.float32) + 0.3)
    assert_within(2.3, w, 16)


def test_scales_of_all_of_a_row_are_folded_into_the_others():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 96)), "w4a16")
    factor = jax.random.uniform(jax.random.key(2), (96,)) + 0.5
    assert_within(1.85, dataclasses.replace(w, global_scale=factor), 4)


def test_what_it_cannot_do_is_said():
    facts = dict(weight="int4", block_n=1, x_format=None, scale_dtype="float16", features=frozenset())
    say = transposed.unsupported
    assert "groups of 96" in say(1, 256, 8, group=96, x_dtype="bfloat16", transposed=True, **facts)
    assert "float32" in say(1, 256, 8, group=128, x_dtype="float32", transposed=True, **facts)
    assert "transpose" in say(1, 256, 8, group=128, x_dtype="bfloat16", transposed=False, **facts)
    assert say(1, 256, 8, group=16, x_dtype="float16", transposed=True, **facts) is None
    e8m0 = {**facts, "scale_dtype": "float8_e8m0fnu"}
    assert "e8m0" in say(1, 256, 8, group=32, x_dtype="float16", transposed=True, **e8m0)
    assert "8.9" in transposed_8bit.unsupported(
        1, 256, 8, group=256, x_dtype="bfloat16", transposed=True, cc=80, **{**facts, "weight": "e4m3"}
    )


def test_configurations_fit_the_chip_and_the_groups():
    of = functools.partial(transposed.configs, 64, 4096, 22016, smem=100 * 1024, sms=58, bits=4, cc=89)
    found = of(group=128)
    assert found
    assert {c["tile_m"] for c in found} == {64}
    assert {c["blocks"] for c in found} == {1, 2}
    assert {c["blocks"] for c in of(group=384)} == {1}
    assert all(c["tile_m"] * c["blocks"] * 128 <= 64 * 32 * c["warps"] for c in found)
    assert max(c["stages"] * c["tile_n"] * (2 * c["tile_m"] + 64) for c in found) <= 100 * 1024
