"""The products of many rows of x, interpreted on a CPU, against float64: programs with edges on every side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels.triton import matmul_tall

# scheme, (M, K, N), (tile_m, tile_n, split_k), error allowed against rounding the exact result: as in `transposed`.
CASES = [
    ("w4a16", (70, 256, 72), (64, 32, 1), 1.85),
    ("w4a16:group_size=-1,symmetric=false", (33, 300, 70), (32, 64, 2), 1.85),
    ("w4a16:group_size=32", (20, 320, 40), (16, 32, 3), 1.85),
    ("w4a16:group_size=64,symmetric=false", (20, 320, 40), (16, 16, 1), 1.85),
    ("w4a16:group_size=256", (17, 512, 33), (16, 16, 2), 1.85),
    ("w4a16:group_size=tensor", (17, 256, 33), (16, 16, 1), 1.1),
    ("mxfp4", (18, 288, 40), (16, 16, 1), 1.01),
    ("nvfp4", (18, 272, 40), (16, 16, 2), 1.01),
    ("w6a16", (17, 384, 24), (16, 16, 1), 1.85),
    ("w5a16:symmetric=false", (17, 256, 24), (16, 16, 1), 1.85),
    ("w3a16:symmetric=true", (17, 256, 24), (16, 16, 1), 1.85),
    ("w2a16", (17, 256, 24), (16, 16, 1), 1.85),
    ("nf4", (18, 320, 40), (16, 32, 1), 2.1),
    ("fp4", (18, 320, 40), (16, 32, 1), 2.1),
]


def assert_within(allowed: float, w: qjax.QTensor, m: int, tile: tuple[int, int, int] | None, **epilogue) -> None:
    k, n = w.shape
    x = jax.random.normal(jax.random.key(1), (m, k)).astype(jnp.bfloat16)
    config = dict(zip(("tile_m", "tile_n", "split_k"), tile, strict=True), warps=4, stages=2) if tile else None
    options = dict(weight=w.scheme.weight, group=w.scheme.block[1] or k, sms=4, config=config, interpret=True)
    parts = dict(zero_point=w.zero_point, global_scale=w.global_scale)
    y = np.asarray(matmul_tall.matmul(x, w.packed, w.scale, **parts, **options, **epilogue), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    if epilogue:
        exact = np.maximum(exact + np.asarray(epilogue["bias"]), 0) + np.asarray(epilogue["residual"])
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert np.linalg.norm(y - exact) <= allowed * rounding


def weight(scheme: str, k: int, n: int) -> qjax.QTensor:
    return qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme)


@pytest.mark.parametrize(("scheme", "shape", "tile", "allowed"), CASES, ids=lambda v: str(v))
def test_an_interpreted_product_is_within_its_error_of_float64(scheme: str, shape: tuple, tile, allowed: float):
    m, k, n = shape
    assert_within(allowed, weight(scheme, k, n), m, tile)


def test_the_tile_that_it_takes_by_itself_and_an_epilogue():
    bias, residual = jnp.linspace(-1, 1, 150), jnp.ones((130, 150))
    assert_within(1.85, weight("w4a16", 256, 150), 130, None, bias=bias, residual=residual, activation=jax.nn.relu)


def test_configurations_leave_no_tile_half_empty_and_fit_the_chip():
    facts = dict(bits=4, smem=227 * 1024, sms=132, cc=90)
    tiles = matmul_tall.configs(128, 4096, 22016, **facts)
    assert {tile["tile_m"] for tile in tiles} == {64, 128}
    assert {tile["tile_m"] for tile in matmul_tall.configs(2048, 4096, 22016, **facts)} == {64, 128, 256}
    assert max(tile["split_k"] for tile in tiles) > 1
    small = matmul_tall.configs(2048, 4096, 22016, **(facts | dict(smem=64 * 1024)))
    assert small and all(tile["tile_m"] < 128 for tile in small)
