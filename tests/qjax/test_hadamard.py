"""Rotated weights (HIGGS): the rotation, the grid, and products that know nothing of either."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.spatial import KDTree
from scipy.stats import norm

import qjax
import qjax.linen
from qjax.dequantize import rows_of_k
from qjax.errors import BackendError, QTensorError, QuantizeError, SchemeError
from qjax.formats import FORMATS
from qjax.hadamard import rotate
from qjax.lookup import look_up
from qjax.qtensor import validate_qtensor

SCHEME = "higgs:group_size=64,hadamard_size=32"
PAIRS = SCHEME + ",bits=3,p=2"


@pytest.fixture(scope="module")
def kernel():
    """Columns of very different sizes."""
    w = jax.random.normal(jax.random.key(0), (192, 40))
    return w * jnp.where(jax.random.uniform(jax.random.key(1), (192, 1)) < 0.05, 20.0, 1.0)


@pytest.mark.parametrize("size", [1, 2, 32, 64])
def test_a_rotation_is_that_of_hadamard_and_its_own_inverse(size):
    a = jax.random.normal(jax.random.key(0), (3, 192))
    block = scipy.linalg.hadamard(size) / math.sqrt(size)
    wanted = np.asarray(a, np.float64) @ scipy.linalg.block_diag(*[block] * (192 // size))
    np.testing.assert_allclose(rotate(a, size), wanted, atol=1e-5)
    np.testing.assert_allclose(rotate(rotate(a, size), size), a, atol=1e-5)


@pytest.mark.parametrize(("name", "decibels"), [("higgs2", 9.30), ("higgs3", 14.62), ("higgs4", 20.22)])
def test_the_grid_errs_least_on_a_gaussian(name, decibels):
    grid = np.array(FORMATS[name].codebook)
    edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
    means = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))  # of what is rounded to each level
    np.testing.assert_allclose(grid, means, atol=1e-9)
    error = 1 - np.sum(grid**2 * np.diff(norm.cdf(edges)))
    assert -10 * math.log10(error) == pytest.approx(decibels, abs=0.005)  # as textbooks have it for 4, 8 and 16 levels


@pytest.mark.parametrize(("name", "error"), [("higgs2_p2", 0.1076), ("higgs3_p2", 0.0297), ("higgs4_p2", 0.00775)])
def test_points_of_two_dimensions_are_the_means_of_what_is_nearest_and_err_less(name, error):
    points = np.array(FORMATS[name].codebook).reshape(-1, 2)
    along = np.arange(-5.5, 5.51, 0.025)
    at = np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)
    weight = norm.pdf(at).prod(axis=1)
    weight /= weight.sum()
    distance, nearest = KDTree(points).query(at)
    share = np.bincount(nearest, weight, minlength=len(points))
    means = np.stack([np.bincount(nearest, weight * at[:, i]) for i in range(2)], axis=-1) / share[:, None]
    np.testing.assert_allclose(points, means, atol=0.02)  # of a lattice
    assert (weight * distance**2).sum() / 2 == pytest.approx(error, abs=2e-4 if error > 0.01 else 5e-5)
    scalar = np.array(FORMATS[name.removesuffix("_p2")].codebook)
    nearer = np.abs(along[:, None] - scalar).min(axis=1)
    assert error < 0.93 * (norm.pdf(along) * nearer**2).sum() * 0.025


def test_pairs_of_the_rotated_weight_are_the_nearest_points(kernel):
    w = qjax.quantize_array(kernel, PAIRS)
    points = np.array(FORMATS["higgs3_p2"].codebook).reshape(-1, 2)
    rotated = np.asarray(rotate(kernel.T, 32), np.float64).reshape(40, 3, 32, 2)
    wide = np.asarray(w.scale, np.float64)[..., None]
    index = (((rotated / wide[..., None])[..., None, :] - points) ** 2).sum(-1).argmin(-1)
    np.testing.assert_allclose(rows_of_k(w), (points[index] * wide[..., None]).reshape(40, 192), rtol=1e-5)
    assert w.nbytes == 40 * 256 * 3 // 8 + 40 * 3 * 2


@pytest.mark.parametrize(("bits", "less"), [(2, 0.965), (3, 0.935), (4, 0.915)])
def test_pairs_err_less_than_scalars(bits, less):
    kernel = jax.random.normal(jax.random.key(0), (512, 64))

    def error(p):
        w = qjax.quantize_array(kernel, f"higgs:bits={bits},p={p}")
        return float(jnp.linalg.norm(w.dequantize() - kernel))

    assert error(p=2) < less * error(p=1)


def test_pairs_have_no_kernel_that_would_read_them_one_by_one(kernel):
    w = qjax.quantize_array(kernel, PAIRS)
    with pytest.raises(BackendError, match="points"):
        qjax.matmul(jnp.ones((1, 192)), w, backend="cpu")
    with pytest.raises(QTensorError, match="has points"):
        validate_qtensor(dataclasses.replace(w, codebook=jnp.ones((8,))), "w")


def test_codes_are_those_of_the_rotated_weight(kernel):
    w = qjax.quantize_array(kernel, SCHEME)
    block = scipy.linalg.hadamard(32) / math.sqrt(32)
    rotated = (np.asarray(kernel, np.float64).T @ scipy.linalg.block_diag(*[block] * 6)).reshape(40, 3, 64)
    scale = np.sqrt((rotated**2).mean(-1)).astype(np.float16)
    np.testing.assert_array_equal(w.scale, scale)
    grid = np.array(FORMATS["higgs4"].codebook)
    wide = scale.astype(np.float64)[..., None]
    nearest = grid[np.abs((rotated / wide)[..., None] - grid).argmin(-1)] * wide
    np.testing.assert_allclose(rows_of_k(w), nearest.reshape(40, 192), rtol=1e-5)
    np.testing.assert_allclose(
        w.dequantize(), (nearest.reshape(40, 192) @ scipy.linalg.block_diag(*[block] * 6)).T, atol=2e-4
    )
    assert w.nbytes == 40 * 256 // 2 + 40 * 3 * 2


def test_rotating_takes_a_third_of_the_error_off_where_weights_have_outliers(kernel):
    def error(scheme):
        return float(jnp.linalg.norm(qjax.quantize_array(kernel, scheme).dequantize() - kernel))

    assert error(SCHEME) < 0.67 * error("nf4:block_size=64")


@pytest.mark.parametrize("scheme", [SCHEME, PAIRS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_gradients_and_lookups_are_those_of_the_dequantized_weight(kernel, dtype, scheme):
    w, x = qjax.quantize_array(kernel, scheme), jax.random.normal(jax.random.key(2), (5, 192)).astype(dtype)
    values, tolerance = w.dequantize(), 2e-5 if dtype == jnp.float32 else 2e-2
    wanted = x.astype(jnp.float32) @ values

    def close(got, want):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, rtol=0, atol=tolerance * float(jnp.abs(want).max())
        )

    close(qjax.matmul(x, w), wanted)
    g = jax.random.normal(jax.random.key(3), (5, 40))
    gradient = jax.grad(lambda x: jnp.sum(g * qjax.matmul(x, w).astype(jnp.float32)))(x)
    close(gradient, g @ values.T)
    close(jax.vmap(lambda x: qjax.matmul(x[None], w)[0])(x), wanted)
    table = qjax.linen.QEmbed(40, 192, scheme=scheme).init(jax.random.key(0), jnp.arange(3))["params"]["embedding"]
    np.testing.assert_allclose(look_up(table, jnp.array([7])), table.dequantize()[7:8], atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("m", None), P(None, "m")])
@pytest.mark.parametrize("scheme", ["higgs", "higgs:p=2"])
def test_products_are_the_same_on_a_mesh(scheme, kind, spec):
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (512, 64)), scheme)
    x = jax.random.normal(jax.random.key(1), (8, 512))
    wanted = qjax.matmul(x, w)
    mesh = jax.make_mesh((4,), ("m",), axis_types=(kind,))
    with jax.sharding.set_mesh(mesh):
        placed = jax.device_put(w, qjax.sharding.shardings(w, mesh, spec))
        x = jax.device_put(x, NamedSharding(mesh, P(None, spec[0])))
        np.testing.assert_allclose(jax.jit(qjax.matmul)(x, placed), wanted, atol=1e-4)


def test_a_shard_that_cuts_a_rotation_is_an_error():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (512, 16)), "higgs:group_size=128,hadamard_size=512")
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
    specs = qjax.sharding.specs(w, P("m", None))
    local = jax.shard_map(lambda x, w: qjax.matmul(x, w), mesh=mesh, in_specs=(P(None, "m"), specs), out_specs=P("m"))
    with pytest.raises(QTensorError, match="rotates blocks of K=256"):
        local(jnp.ones((4, 512)), w)


@pytest.mark.parametrize(
    "text",
    [
        "higgs:hadamard_size=96",
        "higgs:group_size=0",
        "higgs:hadamard_size=true",
        "higgs:p=3",
        "higgs:bits=8",
        "higgs:p=2,group_size=63",
        "higgs:p=2,hadamard_size=1",
    ],
)
def test_a_size_that_cannot_be_is_refused(text):
    with pytest.raises(SchemeError, match="higgs: "):
        qjax.parse_scheme(text)


def test_a_rotation_that_does_not_divide_k_is_refused():
    with pytest.raises(QuantizeError, match="hadamard_size=128 does not divide K=192; powers of two up to 64 do"):
        qjax.quantize_array(jnp.ones((192, 8)), "higgs:group_size=64")
