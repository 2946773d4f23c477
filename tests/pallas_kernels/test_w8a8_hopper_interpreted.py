"""The Hopper kernel of 8 by 8 bits in JAX's interpreter of such kernels, on a CPU: ring, walk over tiles, edges and
arithmetic against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import matmul_w8a8, w8a8_plan
from pallas_kernels.mosaic.w8a8_plan import Tile

# weight, (M, K, N), multiprocessors, tile
CASES = [
    ("int8", (200, 400, 100), 2, Tile(64, 2, 1)),
    ("int8", (300, 512, 130), 4, Tile(128, 3, 2)),
    ("int8", (70, 112, 72), 132, Tile(64, 2, 1)),
    ("e4m3", (130, 1040, 72), 1, Tile(64, 2, 1)),
]


def _operands(weight: str, m: int, k: int, n: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(m + n), 4)

    def codes(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if weight == "int8":
            return jax.random.randint(key, shape, -128, 128).astype(jnp.int8)
        return jnp.clip(jax.random.normal(key, shape) * 120, -448, 448).astype(jnp.float8_e4m3fn)

    x_scale = jax.random.uniform(keys[2], (m, 1), minval=0.5, maxval=1.5)
    return codes(keys[0], (m, k)), codes(keys[1], (n, k)), jax.random.uniform(keys[3], (n, 1)) * 1e-3, x_scale


def _float64(a: jax.Array) -> np.ndarray:
    return np.asarray(a.astype(jnp.float32), np.float64)


def _exact(x: jax.Array, codes: jax.Array, scale: jax.Array, x_scale: jax.Array) -> np.ndarray:
    return (_float64(x) * _float64(x_scale)) @ (_float64(codes) * _float64(scale)).T


def _error(y: jax.Array, exact: np.ndarray) -> float:
    """As a multiple of that of rounding once."""
    rounded = exact.astype(y.dtype).astype(np.float64)
    return float(np.linalg.norm(_float64(y) - exact) / np.linalg.norm(rounded - exact))


FACTS = dict(weight="int8", x_format="int8", group=4096, block_n=1, scale_dtype="float32", transposed=False)


@pytest.mark.parametrize(
    ("strange", "reason"),
    [
        (dict(transposed=True), "transpose"),
        (dict(x_format=None), "x as it is"),
        (dict(weight="e5m2", x_format="e4m3"), "both in e4m3"),
        (dict(group=128), "128 columns"),
        (dict(block_n=128), "128 rows"),
        (dict(scale_dtype="float8_e8m0fnu"), "float8_e8m0fnu"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(strange: dict, reason: str) -> None:
    assert matmul_w8a8.unsupported(100, 4096, 64, **FACTS) is None
    assert reason in matmul_w8a8.unsupported(100, 4096, 64, **(FACTS | strange))


def test_rows_that_are_no_whole_16_bytes_are_left_to_others() -> None:
    facts = FACTS | dict(group=4100)
    assert "not of 4100" in matmul_w8a8.unsupported(100, 4100, 64, **facts)


@pytest.mark.parametrize("weight", ["int8", "e4m3"])
@pytest.mark.parametrize("m", [65, 128, 2048])
def test_configurations_fit_into_shared_memory_and_the_first_choice_is_one_of_them(weight: str, m: int) -> None:
    chip = dict(sms=132, smem=227 * 1024)
    found = matmul_w8a8.configs(m, 4096, 22016, weight=weight, **chip)
    assert all(Tile(**config).smem <= chip["smem"] for config in found)
    assert vars(w8a8_plan.tile_for(m, 22016, weight=weight, **chip)) in found


@pytest.mark.parametrize(("m", "n", "cluster"), [(2048, 22016, 2), (4000, 1000, 1), (5000, 500, 2), (100, 70, 1)])
def test_programs_walk_over_every_tile_once(m: int, n: int, cluster: int) -> None:
    plan = w8a8_plan.Plan(m, n, 4096, False, Tile(128, 4, cluster), 132, True)
    places = {
        tuple(map(int, plan.place(jnp.int32(program), jnp.int32(i), of_cluster)))
        for program in range(plan.walk.programs)
        for i in range(int(plan.walk.count(jnp.int32(program))))
        for of_cluster in range(cluster)
    }
    rows, columns = range(0, m, 128), range(0, n, 128)
    wanted = {(row, column) for row in rows for column in columns}
    assert wanted <= places
    assert all(row < m + 128 * (cluster - 1) and column < n for row, column in places)


def _in_tensor_cores(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`x @ w.T` of 32 products an instruction, terms and sum cut off 13 bits below the largest of them."""
    total = np.zeros((x.shape[0], w.shape[0]))
    for first in range(0, x.shape[1], 32):
        products = x[:, None, first : first + 32] * w[:, first : first + 32]
        terms = np.concatenate([products, total[..., None]], axis=-1)
        unit = 2.0 ** (np.floor(np.log2(np.abs(terms).max(-1, keepdims=True))) - 13)
        total = (np.trunc(terms / unit) * unit).sum(-1)
    return total


def test_sums_that_stay_in_the_tensor_cores_are_too_short_to_lose_what_float16_keeps() -> None:
    rng, (m, k, n) = np.random.default_rng(0), (16, 7392, 24)
    large = np.where(rng.uniform(size=k) < 0.02, 8.0, 1.0)  # as activations have them
    x = rng.standard_normal((m, k)) * large
    x = _float64(jnp.asarray(448 * x / np.abs(x).max(1, keepdims=True), jnp.float8_e4m3fn))
    w = np.nan_to_num(_float64(jnp.asarray(rng.integers(0, 256, (n, k), np.uint8)).view(jnp.float8_e4m3fn)))
    width = matmul_w8a8.PROMOTED * w8a8_plan.STEP
    parts = [_in_tensor_cores(x[:, i : i + width], w[:, i : i + width]) for i in range(0, k, width)]
    exact = x @ w.T
    rounded = (exact / 2**14).astype(np.float16).astype(np.float64) * 2**14
    assert np.linalg.norm(sum(parts) - exact) < 2 * np.linalg.norm(rounded - exact)


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "shape", "sms", "tile"), CASES, ids=lambda v: str(v))
def test_an_interpreted_kernel_is_as_close_to_float64_as_rounding_once_and_does_not_race(
    weight: str, shape: tuple[int, int, int], sms: int, tile: Tile, capfd: pytest.CaptureFixture[str]
) -> None:
    x, codes, scale, x_scale = _operands(weight, *shape)
    y = matmul_w8a8.matmul(x, codes, scale, x_scale=x_scale, weight=weight, config=vars(tile), sms=sms, interpret=True)
    assert y.shape == (shape[0], shape[2])
    assert _error(y, _exact(x, codes, scale, x_scale)) < 1.05
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_what_follows_the_product_is_done_in_float32() -> None:
    x, codes, scale, x_scale = _operands("int8", 70, 144, 72)
    bias, residual = jax.random.normal(jax.random.key(1), (72,)), jax.random.normal(jax.random.key(2), (70, 72))
    exact = _exact(x, codes, scale, x_scale) + _float64(bias)
    given = dict(x_scale=x_scale, weight="int8", config=vars(Tile(64, 2, 1)), sms=2, interpret=True, bias=bias)
    assert _error(matmul_w8a8.matmul(x, codes, scale, **given), exact) < 1.05
    y = matmul_w8a8.matmul(x, codes, scale, **given, activation=jax.nn.silu, residual=residual, out_dtype=jnp.float16)
    assert _error(y, exact / (1 + np.exp(-exact)) + _float64(residual)) < 1.05
