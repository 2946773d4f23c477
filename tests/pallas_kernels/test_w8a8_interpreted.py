"""Products of two eight-bit operands, interpreted on a CPU: against float64, with all that may stand around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import qjax
from pallas_kernels.triton import matmul_w8a8, quantize_rows
from qjax import activations
from qjax.outliers import split_outliers
from qjax.schemes import Activation

# error allowed against rounding the exact product of the codes: sums are exact, or of steps of 128 in float32.
CLOSE = 1.02


def _operands(scheme: str, m: int, k: int, n: int, seed: int = 0):
    """x, its codes as the scheme makes them, and the weight."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (m, k)).astype(jnp.bfloat16)
    w = qjax.quantize_array(jax.random.normal(keys[1], (k, n)) * 0.02, scheme)
    return x, activations.quantize_rows(x, w.scheme.activation, None), w


def _matmul(x: activations.Rows, w: qjax.QTensor, **options):
    block_n, group = w.scheme.block
    given = dict(block_n=block_n or w.out_features, group=group or w.in_features, weight=w.scheme.weight)
    given |= dict(zero_point=w.zero_point, sms=4, interpret=True) | options
    return np.asarray(matmul_w8a8.matmul(x.values, w.packed, w.scale, x_scale=x.scale, **given), np.float64)


def _exact(x: activations.Rows, w: qjax.QTensor) -> np.ndarray:
    return np.asarray(x.dequantize(), np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)


def _assert_close(y: np.ndarray, exact: np.ndarray) -> None:
    rounding = np.linalg.norm(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact)
    assert np.linalg.norm(y - exact) <= CLOSE * rounding


class ProductTest(parameterized.TestCase):
    @parameterized.parameters(
        ("w8a8_int8", (3, 256, 40)),
        ("w8a8_int8", (65, 300, 70)),
        ("w8a8_int8", (1, 100, 1)),
        ("w8a8_int8:activation=tensor", (17, 256, 70)),
        ("w8a8_int8:group_size=128", (17, 384, 70)),
        ("w8a8_int8:group_size=256", (5, 768, 33)),
        ("w8a8_int8:group_size=tensor", (5, 256, 33)),
        ("w8a8_int8:symmetric=false", (17, 1300, 70)),
        ("w8a8_int8:group_size=128,symmetric=false", (9, 256, 33)),
        ("w8a8_fp8", (3, 256, 40)),
        ("w8a8_fp8:granularity=tensor,activation=tensor", (17, 300, 70)),
        ("w8a8_fp8:granularity=block,activation=block", (5, 300, 200)),
    )
    def test_an_interpreted_product_is_within_rounding_of_float64(self, scheme: str, shape: tuple[int, int, int]):
        _, x, w = _operands(scheme, *shape)
        _assert_close(_matmul(x, w), _exact(x, w))

    @parameterized.product(
        scheme=("w8a8_int8:symmetric=false", "w8a8_fp8", "w8a8_fp8:granularity=block,activation=block"),
        tile=((16, 32, 3, 2, 2), (128, 64, 2, 4, 2)),
    )
    def test_every_tile_gives_the_product(self, scheme: str, tile: tuple[int, ...]):
        _, x, w = _operands(scheme, 40, 640, 70)
        config = dict(zip(("tile_m", "tile_n", "split_k", "warps", "stages"), tile, strict=True))
        _assert_close(_matmul(x, w, config=config), _exact(x, w))

    def test_bands_of_tiles_cover_every_row_once(self):
        _, x, w = _operands("w8a8_int8", 16 * matmul_w8a8.BAND + 40, 64, 100)
        config = dict(tile_m=16, tile_n=64, split_k=1, warps=4, stages=2)
        _assert_close(_matmul(x, w, config=config), _exact(x, w))

    @parameterized.parameters((16, 2), (64, 1))
    def test_bias_activation_and_residual_follow_before_the_one_rounding(self, tile_m: int, split_k: int):
        _, x, w = _operands("w8a8_int8", 33, 512, 70)
        bias, residual = jnp.linspace(-1, 1, 70), jax.random.normal(jax.random.key(2), (33, 70)).astype(jnp.bfloat16)
        config = dict(tile_m=tile_m, tile_n=64, split_k=split_k, warps=4, stages=2)
        for activation in (jax.nn.silu, functools.partial(jax.nn.gelu, approximate=False)):
            y = _matmul(x, w, bias=bias, residual=residual, activation=activation, config=config)
            exact = _exact(x, w) + np.asarray(bias, np.float64)
            exact = np.asarray(activation(jnp.asarray(exact)), np.float64)
            _assert_close(y, exact + np.asarray(residual, np.float64))

    def test_it_maps_over_stacked_weights(self):
        operands = [_operands("w8a8_int8", 5, 256, 40, seed) for seed in (0, 1)]
        stacked = [
            jnp.stack(arrays)
            for arrays in zip(*((x.values, w.packed, w.scale, x.scale) for _, x, w in operands), strict=True)
        ]

        def one(x, codes, scale, x_scale):
            return matmul_w8a8.matmul(x, codes, scale, x_scale=x_scale, weight="int8", group=256, interpret=True)

        for y, (_, x, w) in zip(jax.vmap(one)(*stacked), operands, strict=True):
            _assert_close(np.asarray(y, np.float64), _exact(x, w))


class QuantizeRowsTest(parameterized.TestCase):
    @parameterized.product(
        dtype=("bfloat16", "float32"),
        format=("int8", "e4m3"),
        granularity=("token", "block"),
        shape=((5, 300), (1, 7)),
    )
    def test_codes_and_scales_are_those_of_the_formula(self, dtype, format, granularity, shape):
        x = (jax.random.normal(jax.random.key(3), shape) * 3).astype(dtype).at[0, : shape[1] // 2].set(0)

        @jax.jit
        def formula(x):
            rows = activations.quantize_rows(x, Activation(format, granularity), None)
            return rows.values, rows.scale

        codes, scale = formula(x)
        unit = 128 if granularity == "block" else shape[1]
        ours, our_scale = quantize_rows.quantize_rows(x, codes.dtype, unit, interpret=True)
        np.testing.assert_array_equal(our_scale, scale)
        # A CPU's compiler may turn quotients into products, and what is half way may then fall either side.
        differ = np.asarray(ours).view(np.uint8) != np.asarray(codes).view(np.uint8)
        steps = np.abs(np.asarray(x, np.float32) / np.repeat(scale, unit, axis=1)[:, : shape[1]]) % 1
        assert not differ.any() or (format == "int8" and np.abs(steps[differ] - 0.5).max() < 1e-5)

    def test_a_row_of_zeros_has_scale_one(self):
        codes, scale = quantize_rows.quantize_rows(jnp.zeros((2, 256)), jnp.int8, 256, interpret=True)
        assert not np.any(codes)
        np.testing.assert_array_equal(scale, np.ones((2, 1)))


class OutliersTest(parameterized.TestCase):
    @parameterized.parameters((16, 2), (64, 1))
    def test_a_few_columns_multiply_in_sixteen_bits(self, tile_m: int, split_k: int):
        x, _, w = _operands("w8a8_int8", 33, 512, 70)
        x = x.at[5, np.array([3, 77, 300, 511])].multiply(40)
        split = split_outliers(x, 6.0, room=20)
        rest = activations.quantize_rows(split.rest, w.scheme.activation, None)
        dense = w.dequantize(jnp.float32)
        outlier_w = jnp.take(dense, split.columns, axis=0, mode="fill", fill_value=0).T.astype(jnp.bfloat16)
        config = dict(tile_m=tile_m, tile_n=64, split_k=split_k, warps=4, stages=2)
        y = _matmul(rest, w, outlier_x=split.outlier_x, outlier_w=outlier_w, config=config)
        parts = np.asarray(split.outlier_x, np.float64) @ np.asarray(outlier_w, np.float64).T
        _assert_close(y, _exact(rest, w) + parts)
        whole = np.asarray(x, np.float64) @ np.asarray(dense, np.float64)
        plain = _matmul(activations.quantize_rows(x, w.scheme.activation, None), w)
        assert np.linalg.norm(y - whole) < 0.5 * np.linalg.norm(plain - whole)


FACTS = dict(weight="int8", x_format="int8", group=4096, transposed=False, cc=90, scale_dtype="float32")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (dict(transposed=True), "transpose"),
        (dict(x_format=None), "x as it is"),
        (dict(weight="e5m2", x_format="e4m3"), "e5m2"),
        (dict(weight="e4m3", x_format="e4m3", cc=80), "8.9"),
        (dict(group=64), "groups of 64"),
        (dict(k=70_000, group=70_000), "overflow"),
    ],
)
def test_what_it_cannot_do_is_said(changed: dict, word: str):
    facts = dict(k=4096) | FACTS | changed
    assert word in matmul_w8a8.unsupported(16, facts.pop("k"), 64, **facts)
    assert matmul_w8a8.unsupported(16, 4096, 64, **FACTS) is None


@pytest.mark.parametrize("m", [1, 16, 64, 65, 2048])
@pytest.mark.parametrize("weight", ["int8", "e4m3"])
@pytest.mark.parametrize("smem", [99 * 1024, 227 * 1024])
def test_configurations_fit_the_chip(m: int, weight: str, smem: int):
    found = matmul_w8a8.configs(m, 4096, 4096, weight=weight, group=4096, smem=smem, sms=132)
    assert 3 <= len(found) <= 24
    for config in found:
        assert (config["tile_m"] + config["tile_n"]) * matmul_w8a8.STEP * config["stages"] <= smem
