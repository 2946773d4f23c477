"""XLA's int8 product: exact sums, every granularity of the weight's scales, both kinds of zero points."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.xla import int8_dot


@pytest.mark.parametrize("zero_point", [None, "int8", "float32"])
@pytest.mark.parametrize("rows", ["one a row", "one in all", "128 rows"])
@pytest.mark.parametrize("shape", [(1, 64, 8), (5, 300, 333), (3, 4096, 130)], ids=str)
def test_the_product_is_that_of_the_dequantized_operands(shape, rows, zero_point):
    (m, k, n), rng = shape, np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (m, k)), rng.integers(-128, 128, (n, k))
    block_n = {"one a row": 1, "one in all": n, "128 rows": 128}[rows]
    count = -(-n // block_n)
    xs, ws = (rng.uniform(0.5, 2, (size, 1)).astype(np.float32) for size in (m, count))
    of_row = np.arange(n) // block_n
    zero = np.zeros((count, 1)) if zero_point is None else rng.integers(-100, 100, (count, 1))
    exact = (x * xs.astype(np.float64)) @ ((w - zero[of_row]) * ws.astype(np.float64)[of_row]).T
    y = int8_dot.matmul(
        jnp.asarray(x, jnp.int8), jnp.asarray(w, jnp.int8), jnp.asarray(ws), x_scale=jnp.asarray(xs), block_n=block_n,
        zero_point=None if zero_point is None else jnp.asarray(zero, zero_point), out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_allclose(y, exact, rtol=5e-7, atol=1e-6 * np.abs(exact).max())


def test_what_it_cannot_do_is_said():
    facts = dict(weight="int8", x_format="int8", group=512, transposed=False)
    assert int8_dot.unsupported(4, 512, 8, **facts) is None
    assert "not e4m3 by int8" in int8_dot.unsupported(4, 512, 8, **(facts | {"x_format": "e4m3"}))
    assert "groups of 128" in int8_dot.unsupported(4, 512, 8, **(facts | {"group": 128}))
    assert "transposed" in int8_dot.unsupported(4, 512, 8, **(facts | {"transposed": True}))
