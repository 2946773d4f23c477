"""The Hopper kernels in JAX's interpreter of such kernels, on a CPU: pipelines, edges and arithmetic against float64;
and where in a warp a code is against where `wgmma` wants its value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lane_places import places

import qjax
from pallas_kernels.mosaic import byte_operand, folded_plan, matmul_folded, matmul_packed, operand
from pallas_kernels.mosaic.fit_rows import AT, fit_plainly
from pallas_kernels.mosaic.folded_plan import Tile as FoldedTile
from pallas_kernels.mosaic.tiles import Tile
from qjax.dequantize import block_scales
from qjax.devices import find_device
from qjax.dispatch.choose import choose
from qjax.errors import BackendError
from qjax.kernel_call import problem_of
from qjax.qtensor import QTensor

# scheme, (M, K, N), tile, error allowed against rounding the exact result: tables are rounded to x's type first; the
# tile says which kernel it is
CASES = [
    ("w4a16", (3, 640, 70), Tile(8, 1, 1, 1, 2, 2, 0), 1.05),
    ("w4a16:symmetric=false", (1, 1024, 64), Tile(8, 1, 2, 1, 2, 2, 1), 1.05),
    ("w4a16:group_size=32", (9, 700, 70), Tile(8, 2, 1, 2, 1, 2, 1), 1.05),
    ("w4a16:group_size=-1,symmetric=false", (12, 300, 33), Tile(16, 1, 1, 1, 2, 2, 0), 1.05),
    ("w4a16:group_size=tensor", (2, 256, 64), Tile(8, 1, 1, 1, 1, 2, 0), 1.05),
    ("w4a16:group_size=256,scale_dtype=bfloat16", (2, 1024, 40), Tile(8, 1, 1, 2, 2, 2, 1), 1.05),
    ("w4a16", (9, 640, 150), Tile(16, 1, 1, 1, 2, 1, 0, 2), 1.05),
    ("nf4:double_quant=true", (2, 320, 64), Tile(8, 1, 1, 1, 2, 1, 1), 1.7),
    ("fp4", (2, 192, 64), Tile(8, 1, 1, 1, 1, 2, 0), 1.7),
    ("mxfp4", (3, 288, 64), Tile(8, 1, 1, 1, 1, 2, 1), 1.05),
    ("nvfp4", (3, 256, 48), Tile(8, 1, 1, 1, 1, 1, 0), 1.05),
    ("w4a16", (130, 384, 200), FoldedTile(128, 2, 1, 1, 2), 1.05),
    ("w4a16:symmetric=false", (70, 200, 130), FoldedTile(64, 3, 1, 2, 2), 1.05),
    ("w4a16:group_size=32,symmetric=false", (70, 600, 130), FoldedTile(64, 1, 2, 2, 4), 1.05),
    ("w4a16:group_size=-1", (40, 300, 33), FoldedTile(32, 2, 2, 1, 4, 2), 1.05),
    ("w4a16:group_size=tensor", (9, 1100, 70), FoldedTile(32, 1, 4, 1, 8), 1.05),
    ("nf4:double_quant=true", (33, 320, 64), FoldedTile(32, 2, 1, 1, 2), 1.1),
    ("fp4", (33, 192, 64), FoldedTile(32, 2, 1, 2, 2), 1.1),
    ("mxfp4", (33, 288, 64), FoldedTile(32, 2, 1, 1, 2), 1.05),
    ("nvfp4", (33, 256, 48), FoldedTile(64, 2, 1, 2, 2), 1.05),
    ("w8a16", (33, 320, 70), FoldedTile(64, 2, 1, 1, 2), 1.05),
    ("w8a16:group_size=64", (40, 448, 70), FoldedTile(64, 1, 2, 1, 4), 1.05),
    ("fp8", (33, 336, 70), FoldedTile(64, 2, 1, 2, 2), 1.05),
]
KERNELS = {Tile: matmul_packed, FoldedTile: matmul_folded}


def _product(
    scheme: str, m: int, k: int, n: int, dtype: str = "bfloat16", kernel=matmul_packed, **options
) -> tuple[np.ndarray, np.ndarray]:
    """The interpreted product and the exact one, float64."""
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme, partial_groups=True)
    x = jax.random.normal(jax.random.key(1), (m, k)).astype(dtype)
    scale = block_scales(w) if isinstance(w.scale, QTensor) else w.scale
    facts = dict(weight=w.scheme.weight, group=w.scheme.block[1] or k, zero_point=w.zero_point)
    facts["global_scale"] = w.global_scale
    y = kernel.matmul(x, w.packed, scale, interpret=True, **(facts | options))
    return np.asarray(y, np.float64), np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


def _rounding(exact: np.ndarray, dtype: str = "bfloat16") -> float:
    return np.linalg.norm(exact.astype(dtype).astype(np.float64) - exact)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "shape", "tile", "allowed"), CASES, ids=lambda v: str(v))
def test_an_interpreted_kernel_is_as_close_to_float64_as_rounding_once_and_does_not_race(
    scheme: str,
    shape: tuple[int, int, int],
    tile: Tile | FoldedTile,
    allowed: float,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kernel = KERNELS[type(tile)]
    y, exact = _product(scheme, *shape, kernel=kernel, config=vars(tile), sms=2)  # few programs: some have two tiles
    assert np.linalg.norm(y - exact) <= allowed * _rounding(exact)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_what_follows_the_product_is_done_in_float32() -> None:
    bias, residual = (jax.random.normal(jax.random.key(i), s).astype("float16") for i, s in ((2, (40,)), (3, (2, 40))))
    options = dict(config=vars(Tile(8, 1, 1, 1, 1, 2, 0)), bias=bias, residual=residual, activation=jax.nn.silu)
    y, exact = _product("w4a16", 2, 256, 40, "float16", global_scale=jnp.float32(0.5), **options)
    exact = 0.5 * exact + np.asarray(bias, np.float64)
    exact = exact / (1 + np.exp(-exact)) + np.asarray(residual, np.float64)
    assert np.linalg.norm(y - exact) <= 1.05 * _rounding(exact, "float16")


@pytest.mark.slow
def test_with_folded_scales_too() -> None:
    bias, residual = (jax.random.normal(jax.random.key(i), s).astype("float16") for i, s in ((2, (40,)), (3, (9, 40))))
    options = dict(kernel=matmul_folded, config=vars(FoldedTile(32, 1, 1, 1, 2)), bias=bias)
    y, exact = _product("w4a16", 9, 256, 40, "float16", **options)
    exact = exact + np.asarray(bias, np.float64)
    assert np.linalg.norm(y - exact) <= 1.5 * _rounding(exact, "float16")  # values are rounded to it as well
    y, exact = _product("w4a16", 9, 256, 40, global_scale=jnp.float32(0.5), residual=residual, **options)
    exact = 0.5 * exact + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert np.linalg.norm(y - exact) <= 1.05 * _rounding(exact)


def test_rows_of_x_are_fitted_to_float16_without_a_loss() -> None:
    x = jax.random.normal(jax.random.key(0), (5, 300)).astype("bfloat16")
    x = x * 2.0 ** jnp.arange(300)[None] ** 0.5 * jnp.asarray([1e-30, 1e30, 1, 0, 1e-3])[:, None]  # 2^17 within a row
    x = x.astype("bfloat16")
    fitted, back = fit_plainly(x)
    assert fitted.dtype == jnp.float16 and back.shape == (5, 1)
    np.testing.assert_array_equal(fitted.astype(jnp.float32) * back, x.astype(jnp.float32))
    largest = np.abs(np.asarray(fitted, np.float32)).max(axis=1)
    assert ((2.0**AT <= largest) & (largest < 2.0 ** (AT + 1)) | (largest == 0)).all()


@pytest.mark.parametrize(("down", "allowed"), [(0, 2.0**-11.5), (4, 2.0**-11.5), (9, 2.0**-9), (13, 2.0**-5)])
def test_values_of_raised_scales_are_exact_but_for_rounding(down: int, allowed: float) -> None:
    words = jax.random.bits(jax.random.key(0), (64, 16), jnp.uint32)
    scale = jax.random.uniform(jax.random.key(1), (64,), minval=1, maxval=2).astype(jnp.bfloat16).astype(jnp.float32)
    scale = scale * 2.0 ** (-10 - down)  # of a group, `down` powers of two below its row's largest
    raised = jax.lax.bitcast_convert_type((scale * 2.0**24).astype(jnp.float16), jnp.uint16)
    pairs = raised.astype(jnp.uint32) * jnp.uint32(0x10001)
    options = dict(weight="int4", dtype="float16", piece=0, pieces=1, zero=[], interpret=True)
    values = operand.values(words, factors=[pairs], raised=True, **options)
    codes = np.asarray(operand.values(words, factors=[], **options), np.float64)
    exact = codes * np.asarray(scale, np.float64)[:, None]
    error = np.asarray(values, np.float64) - exact
    assert (np.abs(error) <= np.maximum(2.0**-11 * np.abs(exact), 2.0**-25)).all()
    assert np.linalg.norm(error) <= allowed * np.linalg.norm(exact)


@pytest.mark.slow
def test_a_stack_of_weights_is_one_more_axis_of_the_grid() -> None:
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (2, 256, 40)), "w4a16")
    x = jax.random.normal(jax.random.key(1), (2, 3, 256)).astype("bfloat16")

    def one(x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
        return matmul_packed.matmul(x, packed, scale, weight="int4", group=128, interpret=True)

    y = np.asarray(jax.vmap(one)(x, w.packed, w.scale), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert np.linalg.norm(y - exact) <= 1.05 * _rounding(exact)


@pytest.mark.parametrize("piece", [range(16), range(4, 8), range(14, 16)], ids=str)
def test_every_lane_holds_the_codes_of_the_values_that_wgmma_takes_from_it(piece: range) -> None:
    words = places(operand.WORDS, (64, 16))  # a row's block of words
    values = places(operand.VALUES, (64, 8 * len(piece)))
    sources = operand.sources(piece)
    assert values.shape == (4, 32, len(sources), 2)
    for register, (t, half, j) in enumerate(sources):
        row, word = np.divmod(words[:, :, half, j], 16)
        wanted_row, column = np.divmod(values[:, :, register], 8 * len(piece))
        pair = np.arange(2)
        k = 32 * (word % 4)[..., None] + 8 * (t % 4) + 2 * (word // 4)[..., None] + pair  # docs/design.md, packed order
        np.testing.assert_array_equal(wanted_row, np.broadcast_to(row[..., None], wanted_row.shape))
        np.testing.assert_array_equal(8 * piece.start + column, k)


def test_every_lane_holds_the_bytes_of_the_values_that_wgmma_takes_from_it() -> None:
    words, values = places(operand.WORDS, (64, 16)), places(operand.VALUES, (64, 64))
    order = np.asarray(byte_operand.in_order(jnp.arange(64, dtype=jnp.float32)[None])[0], int)
    for column, place in enumerate(order):
        assert column == sum((place & bits) * 2**left for bits, left in byte_operand.MOVES)
    for register in range(values.shape[2]):  # a word's first pair and its second, of rows r and r + 8
        (word, second), half = divmod(register // 2, 2), register % 2
        row, place = np.divmod(words[:, :, half, word], 16)
        wanted_row, column = np.divmod(values[:, :, register], 64)
        np.testing.assert_array_equal(wanted_row, np.broadcast_to(row[..., None], wanted_row.shape))
        np.testing.assert_array_equal(order[column], 4 * place[..., None] + 2 * second + np.arange(2))


def test_what_the_kernel_cannot_do_is_said() -> None:
    facts = dict(weight="int4", group=48, block_n=1, x_dtype="bfloat16", x_format=None, scale_dtype="float16")
    assert "groups of 48" in matmul_packed.unsupported(1, 96, 8, **facts, transposed=False)
    assert "transpose" in matmul_packed.unsupported(1, 96, 8, **facts, transposed=True)


@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_configurations_fit_the_chip(m: int) -> None:
    facts = dict(group=128, smem=227 * 1024, sms=132, symmetric=True)
    found = [Tile(**config) for config in matmul_packed.configs(m, 4096, 22016, **facts)]
    assert found
    for tile in found:
        assert tile.stages % tile.k_groups == 0 and tile.tile_m >= min(m, 64)
        assert 128 * (tile.consumers + 1) * tile.registers <= 65536


@pytest.mark.parametrize("m", [33, 65, 256, 2048])
@pytest.mark.parametrize(("weight", "entries"), [("int4", 1), ("int4", 2), ("e2m1", 8), ("int8", 1)])
def test_configurations_of_folded_scales_fit_the_chip(m: int, weight: str, entries: int) -> None:
    found = folded_plan.candidates(m, 4096, weight, entries, 227 * 1024)
    assert folded_plan.tile_for(m, 22016, 4096, weight, entries, sms=132, smem=227 * 1024) in found
    for tile in found:
        producer, consumer = tile.registers
        assert tile.stages % tile.k_groups == 0 and tile.stages >= 2 * tile.k_groups
        assert tile.smem(weight, entries) <= 227 * 1024
        assert 128 * (producer + tile.consumers * consumer) <= 65536
        assert consumer - tile.tile_m // 2 >= 60  # two pieces of values, words, places


def test_a_configuration_that_would_wait_for_itself_is_refused() -> None:
    for tile, k in ((FoldedTile(32, 1, 4, 1, 4), 4096), (FoldedTile(32, 1, 4, 2, 8), 512)):
        with pytest.raises(ValueError, match="k_groups=4"):
            jax.eval_shape(lambda t=tile, k=k: _product("w4a16", 9, k, 40, kernel=matmul_folded, config=vars(t)))


@pytest.mark.parametrize("scheme", ["w4a16", "nf4", "mxfp4", "nvfp4"])
def test_on_hopper_few_rows_have_a_kernel_of_their_own(scheme: str) -> None:
    w = jax.eval_shape(lambda: qjax.quantize_array(jnp.ones((4096, 4096), jnp.bfloat16), scheme))
    one, many = (problem_of(w, m=m, x_dtype=jnp.bfloat16) for m in (1, 48))
    for device in map(find_device, ("H100-SXM", "H200")):
        assert choose(one, device).route.name == "mosaic.matmul_few"
        assert choose(many, device, backend="mosaic").route.name == "mosaic.matmul_packed"
    with pytest.raises(BackendError, match="needs compute capability 9.0"):
        choose(one, find_device("B200"), backend="mosaic")
