"""The Hopper kernel for few rows of x, lane by lane in NumPy: values against float64, odd shapes, and that what is
forbidden there is noticed: bytes that were not awaited, places beyond an array."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import qjax
from pallas_kernels.mosaic import matmul_few
from pallas_kernels.mosaic.few_plan import Few
from pallas_kernels.mosaic.lanes_numpy import NumpyLanes
from qjax.dequantize import block_scales
from qjax.qtensor import QTensor

# scheme, (M, K, N), configuration, error allowed against rounding the exact result (tables are rounded to x's type)
CASES = [
    ("w4a16", (1, 4096, 704), Few(8, 1, 11, 4, 1), 1.05),
    ("w4a16", (8, 2048, 96), Few(4, 1, 3, 2, 2), 1.05),
    ("w4a16", (16, 1024, 100), Few(4, 2, 4, 2, 3), 1.05),
    ("w4a16:symmetric=false", (3, 1152, 70), Few(4, 1, 2, 1, 2), 1.05),
    ("w4a16:group_size=32,symmetric=false", (9, 992, 70), None, 1.05),
    ("w4a16:group_size=-1,symmetric=false", (12, 300, 33), None, 1.05),
    ("w4a16:group_size=tensor", (2, 256, 64), None, 1.05),
    ("w4a16:group_size=256,scale_dtype=bfloat16", (2, 1024, 40), None, 1.05),
    ("w4a16:group_size=64,scale_dtype=float32", (1, 4304, 17), None, 1.05),
    ("nf4:double_quant=true", (2, 320, 64), None, 1.7),
    ("fp4", (2, 192, 64), None, 1.7),
    ("mxfp4", (3, 1056, 64), None, 1.05),
    ("nvfp4", (3, 1040, 48), None, 1.05),
    ("w8a16", (1, 4096, 352), Few(8, 1, 11, 8, 1), 1.05),
    ("w8a16:group_size=64", (9, 960, 70), None, 1.05),
    ("w8a16:group_size=128", (3, 1408, 40), None, 1.05),
    ("w8a16:group_size=tensor", (2, 256, 64), None, 1.05),
    ("fp8", (5, 1088, 33), None, 1.05),
    ("fp8", (16, 704, 64), Few(4, 1, 2, 2, 2), 1.05),
]


def _product(scheme: str, m: int, k: int, n: int, dtype: str = "bfloat16", **options) -> tuple[np.ndarray, np.ndarray]:
    """The product lane by lane and the exact one, float64."""
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, n)) * 0.02, scheme, partial_groups=True)
    x = jax.random.normal(jax.random.key(1), (m, k)).astype(dtype)
    scale = block_scales(w) if isinstance(w.scale, QTensor) else w.scale
    facts = dict(weight=w.scheme.weight, group=w.scheme.block[1] or k, zero_point=w.zero_point)
    facts["global_scale"] = w.global_scale
    y = matmul_few.matmul(x, w.packed, scale, interpret=True, **(facts | options))
    return np.asarray(y, np.float64), np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


def _rounding(exact: np.ndarray, dtype: str = "bfloat16") -> float:
    return np.linalg.norm(exact.astype(dtype).astype(np.float64) - exact)


@pytest.mark.parametrize(("scheme", "shape", "config", "allowed"), CASES, ids=lambda v: str(v))
def test_it_is_as_close_to_float64_as_rounding_once(
    scheme: str, shape: tuple[int, int, int], config: Few | None, allowed: float
) -> None:
    y, exact = _product(scheme, *shape, config=vars(config) if config else None)
    assert np.linalg.norm(y - exact) <= allowed * _rounding(exact)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(1, 16),
    k=st.integers(1, 700),
    n=st.integers(1, 70),
    scheme=st.sampled_from(["w4a16:group_size=16", "w4a16:symmetric=false", "mxfp4", "nf4"]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)
def test_any_shape(m: int, k: int, n: int, scheme: str, dtype: str) -> None:
    y, exact = _product(scheme, m, k, n, dtype)
    # Of few elements the rounding may be nothing at all; a table's values are rounded, too, each by up to half an ulp.
    values = float(jnp.finfo(dtype).eps) / 2 if scheme == "nf4" else 0.0
    assert np.linalg.norm(y - exact) <= 2.5 * _rounding(exact, dtype) + (1e-4 + values) * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weight", ["int8", "e4m3"])
def test_every_byte_becomes_its_value(weight: str, dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(np.int8 if weight == "int8" else jnp.dtype("float8_e4m3fn"))
    codes = np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros((), codes.dtype))
    x = np.eye(16, 256, dtype=np.float32).astype(dtype)
    for first in range(0, 256, 16):
        packed = np.roll(codes, -first)[None].repeat(16, 0)
        y = matmul_few.matmul(
            jnp.asarray(x), jnp.asarray(packed), jnp.ones((16, 1)), weight=weight, group=256, interpret=True
        )
        np.testing.assert_array_equal(np.asarray(y, np.float32)[:, 0], packed[0, :16].astype(np.float32))


def test_what_follows_the_product_is_done_in_float32() -> None:
    bias, residual = (jax.random.normal(jax.random.key(i), s).astype("float16") for i, s in ((2, (40,)), (3, (2, 40))))
    for activation in (None, jax.nn.silu):
        options = dict(bias=bias, residual=residual, activation=activation, global_scale=jnp.float32(0.5))
        y, exact = _product("w4a16", 2, 256, 40, "float16", **options)
        exact = 0.5 * exact + np.asarray(bias, np.float64)
        exact = exact if activation is None else exact / (1 + np.exp(-exact))
        exact = exact + np.asarray(residual, np.float64)
        assert np.linalg.norm(y - exact) <= 1.05 * _rounding(exact, "float16")


def test_a_stack_of_weights_is_a_vmap() -> None:
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (2, 256, 40)), "w4a16")
    x = jax.random.normal(jax.random.key(1), (2, 3, 256)).astype("bfloat16")

    def one(x: jax.Array, packed: jax.Array, scale: jax.Array) -> jax.Array:
        return matmul_few.matmul(x, packed, scale, weight="int4", group=128, interpret=True)

    y = np.asarray(jax.vmap(one)(x, w.packed, w.scale), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert np.linalg.norm(y - exact) <= 1.05 * _rounding(exact)


def test_a_copy_that_was_not_awaited_reads_as_nan() -> None:
    o = NumpyLanes(1, 1, {"ring": 512})
    data = np.arange(128, dtype=np.float32)
    o.copy("ring", o.lane * 16, 0, o.pointer(data) + o.lane * 16, 0, 16, o.lane < 32)
    o.commit()
    assert np.isnan(o.as_reals(o.read("ring", o.lane * 16, 16)[0], "float32")[0]).all()
    o.wait(0)
    np.testing.assert_array_equal(o.as_reals(o.read("ring", o.lane * 16, 16)[1], "float32")[0][0, 0], data[1::4])


def test_a_load_beyond_an_array_raises() -> None:
    o = NumpyLanes(1, 1, {})
    with pytest.raises(IndexError, match="of an array of 124"):
        o.load(o.pointer(np.zeros(31, np.float32)) + o.lane * 4, 4)
