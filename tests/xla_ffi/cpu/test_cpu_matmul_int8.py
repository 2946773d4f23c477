"""int8 by int8 and int4 on the CPU: exact sums, each set of instructions, groups, both kinds of zero points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import oracle, tolerance
from products import Product, exact_rows, exact_weight, program, random_operands

import qjax
from qjax import devices
from qjax.dispatch.choose import choose, refusal
from qjax.dispatch.routes import ROUTES
from xla_ffi.cpu import library, matmul_int8

CPU = devices.find_device("CPU")
(ROUTE,) = (route for route in ROUTES if route.name == "cpu.matmul_int8")

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

INSTRUCTIONS = library.int8_instructions() or ("none",)
SCHEMES = (
    "w8a8_int8",
    "w8a8_int8:mode=static",
    "w8a8_int8:group_size=128,symmetric=false",
    "w8a8_int8:group_size=tensor",
    "w4a8_int8",
    "w4a8_int8:group_size=32,symmetric=false",
    "w4a8_int8:group_size=96",
    "w4a8_int8:group_size=-1,symmetric=false",
)
SHAPES = ((1, 256, 37), (2, 128, 1), (4, 392, 24), (7, 640, 17), (134, 136, 5))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", [{}, {"epilogue": True}, {"real_zero": True}], ids=str)
def test_the_product_is_that_of_float64(scheme, variant, instructions):
    if "real_zero" in variant and "symmetric=false" not in scheme:
        pytest.skip("no zero points")
    for m, k, n in SHAPES[SCHEMES.index(scheme) % 2 :: 2]:
        product = Product(scheme, m, k, n, **variant)
        assert refusal(ROUTE, product.problem, CPU) is None
        o = random_operands(product, np.random.default_rng(0))
        run = jax.jit(program(ROUTE, product, {"instructions": instructions}))
        y, met = run(jax.tree.map(jnp.asarray, o))
        x, w = exact_rows(met), exact_weight(o.w).T
        bias = 0 if o.bias is None else np.asarray(o.bias, np.float64)
        exact = oracle(x, w, o.bias, product.problem.activation, o.residual)
        bound = tolerance(x, w, exact, y.dtype, epilogue=np.abs(x @ w) + np.abs(bias))
        worst = np.max(np.abs(np.asarray(y, np.float64) - exact) / bound)
        assert worst <= 1, f"{product}: error is {worst:.3g} of what is allowed"


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_with_one_scale_a_row_sums_are_exact_at_the_largest_magnitudes(weight, instructions):
    m, k, n = 5, 8192, 6
    rng = np.random.default_rng(0)
    low = -128 if weight == "int8" else -8
    x, w = rng.choice([-128, 127], (m, k)), rng.choice([low, -low - 1], (n, k))
    x[0], w[0] = -128, low  # the largest sum of all
    packed = jnp.asarray(w, jnp.int8) if weight == "int8" else qjax.layouts.pack(jnp.asarray(w + 8), 4)
    y = matmul_int8.matmul(
        jnp.asarray(x, jnp.int8), packed, jnp.ones((n, 1)), x_scale=jnp.ones((m, 1)), group=k,
        config={"instructions": instructions},
    )  # fmt: skip
    np.testing.assert_array_equal(y, (x @ w.T).astype(np.float32))


def test_dispatch_takes_it_where_x_is_quantized():
    w = qjax.quantize_array(jnp.ones((4096, 4096)), "w8a8_int8")
    explained = str(qjax.explain(w, m=1, device="CPU"))
    assert "cpu.matmul_int8" in explained and library.int8_instructions()[0] in explained
    assert choose(Product("w4a8_int8:group_size=16", 1, 256, 64).problem, CPU).route.name == "cpu.matmul"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(transposed=True), "not by its transpose"),
        (dict(x_format=None), "not x as it is by int4"),
        (dict(weight="e4m3"), "not int8 by e4m3"),
        (dict(group=48), "multiples of 32"),
        (dict(weight="int8", group=64), "multiples of 128"),
        (dict(k=2**17, group=2**17), "K=131072"),
    ],
)
def test_what_it_cannot_do_is_said(facts, reason):
    known = dict(m=1, k=256, n=64, weight="int4", group=128, x_format="int8", x_granularity="token", transposed=False)
    assert matmul_int8.unsupported(**known) is None
    assert reason in matmul_int8.unsupported(**(known | facts))
