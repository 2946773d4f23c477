"""The Hopper kernel of 4 by 8 bits in JAX's interpreter of such kernels, on a CPU: ring, running sums, walk over tiles,
edges and arithmetic against float64; and where a lane's codes are, against where `wgmma` wants them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lane_places import places
from products import codes_of

from pallas_kernels.mosaic import int8_operand, matmul_w4a8, operand, w4a8_plan
from pallas_kernels.mosaic.w4a8_plan import Tile

# (M, K, N), columns of a group, multiprocessors, tile
CASES = [
    ((100, 400, 130), 128, 2, Tile(64, 2, 1)),
    ((70, 520, 300), 256, 4, Tile(96, 3, 2)),
    ((70, 272, 72), 272, 132, Tile(64, 2, 1)),
    ((66, 4400, 64), 128, 132, Tile(96, 3, 1)),
]


def _operands(m: int, k: int, n: int, group: int) -> tuple[jax.Array, ...]:
    keys, blocks = jax.random.split(jax.random.key(m + n), 4), -(-k // 128)
    x = jax.random.randint(keys[0], (m, k), -127, 128).astype(jnp.int8)
    packed = jax.random.bits(keys[1], (n, blocks, 16), jnp.uint32)
    scale = jax.random.uniform(keys[2], (n, -(-k // group)), minval=0.5e-3, maxval=1e-3).astype(jnp.float16)
    return x, packed, scale, jax.random.uniform(keys[3], (m, 1), minval=0.5, maxval=1.5)


def _exact(x: jax.Array, packed: jax.Array, scale: jax.Array, x_scale: jax.Array, group: int) -> np.ndarray:
    k = x.shape[1]
    codes = codes_of(np.asarray(packed), 4)[:, :k].astype(np.float64) - 8
    weight = codes * np.asarray(scale, np.float64)[:, np.arange(k) // group]
    return (np.asarray(x, np.float64) * np.asarray(x_scale, np.float64)) @ weight.T


def _error(y: jax.Array, exact: np.ndarray) -> float:
    """As a multiple of that of rounding once."""
    rounded = exact.astype(y.dtype).astype(np.float64)
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(rounded - exact))


FACTS = dict(symmetric=True, group=128, block_n=1, transposed=False)


@pytest.mark.parametrize(
    ("strange", "reason"),
    [
        (dict(transposed=True), "transpose"),
        (dict(symmetric=False), "zero points"),
        (dict(group=64), "groups of 64"),
        (dict(block_n=128), "128 rows"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(strange: dict, reason: str) -> None:
    assert matmul_w4a8.unsupported(100, 4096, 64, **FACTS) is None
    assert reason in matmul_w4a8.unsupported(100, 4096, 64, **(FACTS | strange))


@pytest.mark.parametrize("m", [65, 128, 2048])
def test_configurations_fit_into_shared_memory_and_the_first_choice_is_one_of_them(m: int) -> None:
    chip = dict(sms=132, smem=227 * 1024)
    found = matmul_w4a8.configs(m, 4096, 22016, **chip)
    assert all(Tile(**config).smem <= chip["smem"] for config in found)
    assert vars(w4a8_plan.tile_for(m, 22016, **chip)) in found


@pytest.mark.parametrize(("m", "n", "cluster"), [(2048, 22016, 2), (4000, 1000, 1), (5000, 500, 2), (100, 70, 1)])
def test_programs_walk_over_every_tile_once(m: int, n: int, cluster: int) -> None:
    plan = w4a8_plan.Plan(m, n, 32, 128, "float16", False, True, Tile(128, 4, cluster), 132, True)
    places = [
        tuple(map(int, plan.place(jnp.int32(program), jnp.int32(i), of_cluster)))
        for program in range(plan.walk.programs)
        for i in range(int(plan.walk.count(jnp.int32(program))))
        for of_cluster in range(cluster)
    ]
    assert len(places) == len(set(places))
    wanted = {(row, column) for row in range(0, m, 128) for column in range(0, n, 128)}
    assert wanted <= set(places)
    assert all(row < m and column < n + 128 * (cluster - 1) for row, column in places)


def test_every_lane_holds_the_codes_of_the_values_that_wgmma_takes_from_it() -> None:
    words, values = places(operand.WORDS, (64, 16)), places(int8_operand.OPERAND, (64, 128))
    in_order = np.asarray(int8_operand.in_order(jnp.arange(128, dtype=jnp.int8)[None]))[0]  # column of x of each of w
    byte = np.arange(4)
    half_of_word, nibble = byte // 2, 2 * (byte % 2)  # a register's bytes are a word's, those of every other nibble
    assert values.shape == (4, 32, len(int8_operand.sources()), 4)
    for register, (j, half, first) in enumerate(int8_operand.sources()):
        row, word = np.divmod(words[:, :, half, j], 16)
        wanted_row, column = np.divmod(values[:, :, register], 128)
        k = 32 * (word % 4)[..., None] + 8 * (nibble + first) + 2 * (word // 4)[..., None] + half_of_word
        np.testing.assert_array_equal(wanted_row, np.broadcast_to(row[..., None], wanted_row.shape))
        np.testing.assert_array_equal(in_order[column], k)  # docs/design.md, packed order


def test_values_are_codes_less_the_middle_one_in_the_order_of_x() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (64, 16), np.uint32)
    codes = codes_of(words[:, None], 4).astype(np.int8) - np.int8(8)
    found = int8_operand.values(jnp.asarray(words), interpret=True)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(int8_operand.in_order(jnp.asarray(codes))))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "group", "sms", "tile"), CASES, ids=lambda v: str(v))
def test_an_interpreted_kernel_is_as_close_to_float64_as_rounding_once_and_does_not_race(
    shape: tuple[int, int, int], group: int, sms: int, tile: Tile, capfd: pytest.CaptureFixture[str]
) -> None:
    x, packed, scale, x_scale = _operands(*shape, group)
    y = matmul_w4a8.matmul(x, packed, scale, x_scale=x_scale, group=group, config=vars(tile), sms=sms, interpret=True)
    assert y.shape == (shape[0], shape[2])
    assert _error(y, _exact(x, packed, scale, x_scale, group)) < 1.05
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_scale", "out_dtype"), [("float16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float16")]
)
def test_scales_of_a_row_that_lie_far_apart_cost_no_accuracy(of_scale: str, out_dtype: str) -> None:
    keys = jax.random.split(jax.random.key(7), 2)
    _, packed, _, x_scale = _operands(64, 1024, 64, 128)
    x = jnp.clip(jnp.round(32 * jax.random.normal(keys[0], (64, 1024))), -127, 127).astype(jnp.int8)
    scale = (1e-3 * 2 ** jax.random.uniform(keys[1], (64, 8), minval=-3, maxval=3)).astype(of_scale)
    scale = scale.at[:, 2].set(64e-3)
    given = dict(x_scale=x_scale, group=128, config=vars(Tile(64, 2, 1)), sms=1, interpret=True, out_dtype=out_dtype)
    assert _error(matmul_w4a8.matmul(x, packed, scale, **given), _exact(x, packed, scale, x_scale, 128)) < 1.05


@pytest.mark.slow
def test_what_follows_the_product_is_done_in_float32() -> None:
    x, packed, scale, x_scale = _operands(70, 144, 72, 128)
    bias, residual = jax.random.normal(jax.random.key(1), (72,)), jax.random.normal(jax.random.key(2), (70, 72))
    exact = _exact(x, packed, scale, x_scale, 128) + np.asarray(bias, np.float64)
    given = dict(x_scale=x_scale, group=128, config=vars(Tile(64, 2, 1)), sms=2, interpret=True, bias=bias)
    assert _error(matmul_w4a8.matmul(x, packed, scale, **given), exact) < 1.05
    y = matmul_w4a8.matmul(x, packed, scale, **given, activation=jax.nn.silu, residual=residual, out_dtype=jnp.float16)
    assert _error(y, exact / (1 + np.exp(-exact)) + np.asarray(residual, np.float64)) < 1.05
