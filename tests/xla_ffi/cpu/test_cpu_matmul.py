"""The CPU's products against float64: every format, each set of instructions, odd shapes, any number of threads."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WEIGHT_ONLY, oracle, tolerance
from products import Product, exact_weight, random_operands

import qjax
from qjax import devices
from qjax.activations import Rows
from qjax.dispatch.choose import choose, refusal
from qjax.dispatch.routes import ROUTES
from qjax.kernel_call import problem_of, run_route
from xla_ffi.cpu import library, matmul

ROOT = Path(__file__).parents[3]
CPU = devices.find_device("CPU")
(ROUTE,) = (route for route in ROUTES if route.name == "cpu.matmul")

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

INSTRUCTIONS = library.instructions() or ("none",)

# M of each form and over one round of 128 rows; N one, odd and over a panel; K of one block, many, no whole blocks.
SHAPES = ((1, 256, 37), (2, 128, 1), (3, 392, 24), (7, 640, 17), (134, 136, 5))


def assert_exact(y, product: Product, o) -> None:
    """`y` is the product of these numpy operands within the bound of float32 sums and one rounding."""
    x, w = np.asarray(o.x, np.float64), exact_weight(o.w)
    w = w if product.transposed else np.swapaxes(w, -1, -2)
    activation = product.problem.activation
    exact = oracle(x, w, None if o.bias is None else o.bias[..., None, :], activation, o.residual)
    argument = 0 if o.bias is None else np.abs(x @ w) + np.abs(np.asarray(o.bias, np.float64)[..., None, :])
    bound = tolerance(x, w, exact, y.dtype, epilogue=argument)
    assert y.shape == exact.shape
    worst = np.max(np.abs(np.asarray(y, np.float64) - exact) / bound)
    assert worst <= 1, f"{product}: error is {worst:.3g} of what is allowed"


def check(product: Product, instructions: str, seed: int = 0) -> None:
    assert refusal(ROUTE, product.problem, CPU) is None
    o = random_operands(product, np.random.default_rng(seed))

    @jax.jit
    def run(o):
        config = {"instructions": instructions}
        return run_route(ROUTE, config, Rows(o.x), o.w, product.problem, bias=o.bias, residual=o.residual)

    assert_exact(run(jax.tree.map(jnp.asarray, o)), product, o)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_every_format_gives_the_product_of_float64_at_odd_shapes(scheme, instructions):
    for m, k, n in SHAPES[WEIGHT_ONLY.index(scheme) % 2 :: 2]:
        check(Product(scheme, m, k, n, x_dtype="float32"), instructions)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16:group_size=48,symmetric=false", "w3a16", "w2a16:group_size=96"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_x_of_any_float_with_bias_activation_and_residual_is_rounded_once(scheme, x_dtype, instructions):
    for m in (1, 6):
        check(Product(scheme, m, 432, 19, x_dtype=x_dtype, epilogue=True), instructions)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_many_rows_of_bfloat16_are_rounded_once(scheme, instructions):
    for m, k, n in ((9, 400, 19), (70, 256, 37)):
        check(Product(scheme, m, k, n), instructions)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    "scheme", ["w4a16:symmetric=false", "w8a16:group_size=16,symmetric=false", "w5a16:symmetric=false"]
)
def test_zero_points_may_be_real_numbers(scheme, instructions):
    for m in (1, 6):
        check(Product(scheme, m, 400, 21, real_zero=True), instructions)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_the_product_with_the_transposed_weight_is_that_of_float64_too(scheme, instructions):
    for m, k, n in SHAPES[WEIGHT_ONLY.index(scheme) % 2 :: 2]:
        check(Product(scheme, m, k, n, x_dtype="float32", transposed=True), instructions)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("scheme", ["w4a16:symmetric=false", "w8a16:group_size=16,symmetric=false", "w3a16"])
def test_transposed_x_of_16_bits_with_zero_points_of_any_kind_is_rounded_once(scheme, instructions):
    for m in (1, 6):
        check(Product(scheme, m, 400, 21, transposed=True), instructions)
        if "false" in scheme:
            check(Product(scheme, m, 400, 21, transposed=True, real_zero=True), instructions)


@pytest.mark.parametrize("scheme", ["w4a16", "fp8", "nvfp4", "nf4:double_quant=true"])
def test_a_stack_of_weights_is_one_call(scheme):
    product = Product(scheme, 3, 200, 10, x_dtype="float32", stack=3)
    check(product, "")
    check(dataclasses.replace(product, transposed=True), "")
    o = jax.tree.map(jnp.asarray, random_operands(product, np.random.default_rng(0)))
    text = jax.jit(lambda o: run_route(ROUTE, {}, Rows(o.x), o.w, product.problem)).lower(o).as_text()
    assert text.count(library.TARGET) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_of_the_tensor_replaces_the_formats_own(bits):
    rng = np.random.default_rng(0)
    codes, table = rng.integers(0, 2**bits, (6, 256)), rng.standard_normal(2**bits).astype(np.float32)
    packed = qjax.layouts.pack(jnp.asarray(codes), 4) if bits == 4 else jnp.asarray(codes, jnp.uint8)
    x, scale = rng.standard_normal((2, 256)).astype(np.float32), rng.uniform(1, 2, (6, 2)).astype(np.float32)
    y = matmul.matmul(jnp.asarray(x), packed, jnp.asarray(scale), group=128, codebook=jnp.asarray(table))
    exact = x.astype(np.float64) @ (table.astype(np.float64)[codes] * np.repeat(scale, 128, 1)).T
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)


def gradient(w, dy):
    """That of x, by this kernel, for the gradient `dy` of the result."""
    _, back = jax.vjp(lambda x: qjax.matmul(x, w, backend="cpu"), jnp.zeros((dy.shape[0], w.in_features), dy.dtype))
    return back(dy)[0]


@pytest.mark.parametrize("parts", [lambda w: qjax.concat_rows([w(0, "nvfp4"), w(1, "nvfp4")]), lambda w: w(0, "nf4")])
def test_gradients_pass_global_scales_of_merged_parts_and_nested_ones(parts):
    rng = np.random.default_rng(0)
    dense = jnp.asarray(rng.standard_normal((2, 264, 24)) * [[[1]], [[100]]], jnp.float32)
    w = parts(lambda i, scheme: qjax.quantize_array(dense[i], scheme, partial_groups=True))
    dy = jnp.asarray(rng.standard_normal((3, w.out_features)), jnp.float32)
    exact = np.asarray(dy, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64).T
    np.testing.assert_allclose(gradient(w, dy), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("scheme", ["w4a16:group_size=32", "mxfp4", "w3a16:group_size=-1"])
def test_padded_pieces_are_multiplied_and_their_gradients_have_no_padding(scheme):
    rng = np.random.default_rng(0)
    w = qjax.quantize_array(jnp.asarray(rng.standard_normal((384, 20)), jnp.float32), scheme, k_pieces=4)
    assert w.k_piece == (96, 128)
    x, dy = (jnp.asarray(rng.standard_normal((3, size)), jnp.float32) for size in (384, 20))
    dense = np.asarray(w.dequantize(jnp.float32), np.float64)
    forward, back = np.asarray(x, np.float64) @ dense, np.asarray(dy, np.float64) @ dense.T
    np.testing.assert_allclose(qjax.matmul(x, w, backend="cpu"), forward, rtol=1e-5, atol=1e-5 * np.abs(forward).max())
    np.testing.assert_allclose(gradient(w, dy), back, rtol=1e-5, atol=1e-5 * np.abs(back).max())


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_byte_of_e8m0_is_its_power_of_two(instructions):
    w = qjax.quantize_array(jnp.ones((32, 256), jnp.float32), "mxfp4")  # codes are 4
    w = dataclasses.replace(w, scale=jnp.asarray(np.arange(256, dtype=np.uint8)[:, None].view(w.scale.dtype)))
    problem = problem_of(w, m=1, x_dtype=jnp.float32, out_dtype=jnp.float32)
    x = jnp.zeros((1, 32), jnp.float32).at[0, 5].set(0.25)
    y = run_route(ROUTE, {"instructions": instructions}, Rows(x), w, problem)[0]
    normal = np.arange(1, 255)  # XLA's threads take 2^-127, which is subnormal, for 0
    np.testing.assert_array_equal(y[1:255], np.ldexp(1.0, normal - 127).astype(np.float32))
    assert np.isnan(y[255])


PRODUCTS_OF_ANY_THREADS = """
import sys
import jax, jax.numpy as jnp, numpy as np, qjax
rng = np.random.default_rng(0)
for scheme in ("w4a16", "w8a16:group_size=32,symmetric=false", "nvfp4"):
    w = qjax.quantize_array(jnp.asarray(rng.standard_normal((1152, 1000)), jnp.float32), scheme)
    for m in (1, 7, 130):
        y = qjax.matmul(jnp.asarray(rng.standard_normal((m, 1152)), jnp.float32), w, backend="cpu")
        sys.stdout.buffer.write(np.asarray(y).tobytes())
        _, back = jax.vjp(lambda x: qjax.matmul(x, w, backend="cpu"), jnp.zeros((m, 1152), jnp.float32))
        sys.stdout.buffer.write(np.asarray(back(y)[0]).tobytes())
"""


@functools.cache
def bits_with(threads: int) -> bytes:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads)}
    return subprocess.run(
        [sys.executable, "-c", PRODUCTS_OF_ANY_THREADS], env=env, capture_output=True, check=True
    ).stdout


@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    assert len(bits_with(1)) == 3 * 138 * (1000 + 1152) * 4
    assert bits_with(threads) == bits_with(1)


def test_dispatch_takes_it_and_explain_names_the_instructions():
    w = qjax.quantize_array(jnp.ones((256, 64)), "w4a16")
    choice = choose(problem_of(w, m=1, x_dtype="float32"), CPU)
    assert choice.route is ROUTE
    assert library.instructions()[0] in str(qjax.explain(w, m=1, device="CPU"))


def test_gradients_vmap_and_scan_go_through_it():
    rng = np.random.default_rng(0)
    w = qjax.quantize_array(jnp.asarray(rng.standard_normal((2, 256, 256)), jnp.float32), "w4a16")
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.float32)
    dense = w.dequantize(jnp.float32)

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w) if w.ndim == 2 else x, None), x, w)[0]

    def ours(x):
        return jax.lax.scan(lambda x, w: (qjax.matmul(x, w, activation="silu"), None), x, w)[0]

    np.testing.assert_allclose(jax.jit(ours)(x), layers(x, dense), rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda x: ours(x).sum())(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: layers(x, dense).sum())(x), rtol=1e-2, atol=1e-2)
    each = jax.vmap(lambda w: qjax.matmul(x, w))(w)
    np.testing.assert_allclose(each, jnp.einsum("mk,skn->smn", x, dense), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(x_dtype="float64"), "not in float64"),
        (dict(scale_dtype="float64"), "scales in float32"),
        (dict(group=24), "groups of 24"),
    ],
)
def test_what_it_cannot_do_is_said(facts, reason):
    known = dict(group=128, x_format=None, x_dtype="float32", scale_dtype="float16")
    assert matmul.unsupported(1, 256, 64, **known) is None
    assert reason in matmul.unsupported(1, 256, 64, **(known | facts))


def test_shapes_that_do_not_fit_are_an_error_that_names_them():
    x, packed, scale = jnp.ones((1, 256)), jnp.zeros((8, 2, 16), jnp.uint32), jnp.ones((8, 2))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"shapes do not fit.*F32\[1,256\].*\[8,3\]"):
        matmul.matmul(x, packed, jnp.ones((8, 3)), group=128).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"one for each scale.*zero_point S8\[2,8\]"):
        matmul.matmul(x, packed, scale, group=128, zero_point=jnp.zeros((2, 8), jnp.int8)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not have the instructions 'sve'"):
        matmul.matmul(x, packed, scale, group=128, config={"instructions": "sve"}).block_until_ready()


def test_without_the_library_the_reference_runs_and_says_why(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "libqjax_cpu.so is not built")
    w = qjax.quantize_array(jnp.ones((272, 64)), "w4a16:group_size=16")
    choice = choose(dataclasses.replace(problem_of(w, m=1, x_dtype="float32"), n=65), CPU)
    assert choice.route.is_reference
    assert dict(choice.reasons)["cpu.matmul"] == "libqjax_cpu.so is not built"
