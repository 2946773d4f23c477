"""x quantized by a kernel: the formula's codes under jit, vmap and grad, and wherever x is cut; who is asked when."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import quantize_call
from qjax.activations import quantize_rows
from qjax.devices import find_device
from qjax.dispatch.quantizer import choose_quantizer
from qjax.dispatch.routes import QUANTIZERS
from qjax.schemes import Activation

X = jax.random.normal(jax.random.key(0), (4, 6, 1024)) * jnp.linspace(0.1, 4, 6)[:, None]
TOKEN, BLOCK = Activation("int8", "token"), Activation("e4m3", "block")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A kernel on this CPU; the shapes that it was called with."""
    shapes: list[tuple[int, ...]] = []

    def kernel(x: jax.Array, dtype: object, unit: int) -> tuple[jax.Array, jax.Array]:
        shapes.append(x.shape)
        rows = quantize_rows(x, TOKEN if dtype == jnp.int8 else BLOCK, None)
        assert rows.scale is not None and rows.scale.shape[-1] == -(-x.shape[-1] // unit)
        return rows.values, rows.scale

    row = dataclasses.replace(QUANTIZERS[0], name="a kernel of the test")
    for made in (quantize_call._batchable, quantize_call._auto):
        made.cache_clear()  # they hold programs with another test's kernel
    monkeypatch.setattr(quantize_call, "choose_quantizer", lambda *args, **kwargs: row)
    monkeypatch.setattr(quantize_call, "load", lambda row: types.SimpleNamespace(quantize_rows=kernel))
    return shapes


def assert_formula(found: quantize_call.Rows, x: jax.Array, activation: Activation) -> None:
    # compiled alike: a CPU's compiler fuses the quotients of a cut x in another way, which may move the last bit
    expected = jax.jit(lambda x: dataclasses.astuple(quantize_rows(x, activation, None)))(x)
    codes, other = (np.asarray(a, np.float32) for a in (found.values, expected[0]))
    assert found.values.dtype == expected[0].dtype
    np.testing.assert_allclose(found.scale, expected[1], rtol=1e-6)
    assert (np.abs(codes - other) <= np.where(codes == other, 0, 0.1 * np.abs(other) + 1)).all()
    assert (codes != other).mean() < 1e-3


@pytest.mark.parametrize("activation", [TOKEN, BLOCK], ids=str)
def test_rows_of_any_rank_are_one_call_of_the_kernel(activation: Activation, calls: list):
    assert_formula(quantize_call.quantized(X, activation, None, None), X, activation)
    assert calls == [(24, 1024)]


def test_a_batch_is_more_rows(calls: list):
    found = jax.vmap(lambda x: quantize_call.quantized(x, TOKEN, None, None))(X)
    assert_formula(found, X, TOKEN)
    assert calls[-1] == (24, 1024)


LAYOUTS = {
    "rows": P("d", None, None),
    "k": P(None, None, "t"),
    "both": P("d", None, "t"),
    "all of k": P(None, None, ("d", "t")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [TOKEN, BLOCK], ids=["token", "block"])
def test_codes_are_the_same_wherever_x_is_cut(activation: Activation, layout: str, kind: AxisType, calls: list):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, LAYOUTS[layout]))
    run = jax.jit(lambda x: quantize_call.quantized(x, activation, None, None))
    text = run.lower(x).compile().as_text()
    found = run(x)
    assert_formula(found, X, activation)
    assert found.values.sharding.spec == x.sharding.spec
    assert "all-gather" not in text
    through = activation is TOKEN and layout != "rows"
    assert ("all-reduce" in text) == through
    # where K is cut through scales no device calls the kernel; the partitioner traces the whole besides
    assert through or any(shape != (24, 1024) for shape in calls)


def test_blocks_of_k_that_a_cut_would_tear_are_gathered(calls: list):
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(X[..., :960], NamedSharding(mesh, P(None, None, "t")))
    assert_formula(quantize_call.quantized(x, BLOCK, None, None), X[..., :960], BLOCK)


def test_a_product_and_its_gradient_go_through_the_kernel(calls: list):
    w = qjax.quantize_array(jax.random.normal(jax.random.key(1), (1024, 64)) * 0.03, "w8a8_int8")
    y, pull = jax.vjp(lambda x: qjax.matmul(x, w), X)
    assert calls == [(24, 1024)]
    exact = np.asarray(X, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0][0, 0], w.dequantize().sum(axis=1), rtol=1e-4, atol=1e-4)


def test_no_elements_need_no_kernel(calls: list):
    assert quantize_call.quantized(X[:0], TOKEN, None, None).scale.shape == (0, 6, 1)
    assert not calls


def test_a_kernel_is_chosen_where_there_is_one():
    h200, a100 = find_device("H200"), find_device("A100-SXM4-80GB")
    assert choose_quantizer(TOKEN, 4096, h200).name == "triton.quantize_rows"
    assert choose_quantizer(TOKEN, 4096, h200, "cublaslt").name == "triton.quantize_rows"
    assert choose_quantizer(TOKEN, 4096, a100).name == "triton.quantize_rows"
    assert choose_quantizer(BLOCK, 4096, a100) is None  # no FP8 there
    assert choose_quantizer(TOKEN, 4096, h200, "xla") is None
    assert choose_quantizer(TOKEN, 2**20, h200) is None  # more than a program holds
    assert choose_quantizer(Activation("int8", "tensor"), 4096, h200) is None
    assert choose_quantizer(Activation("int8", "tensor", "static"), 4096, h200) is None
    assert choose_quantizer(TOKEN, 4096, find_device("cpu")) in (None, QUANTIZERS[1])  # whether it is built or not
    assert choose_quantizer(BLOCK, 4096, find_device("cpu")) is None
    assert choose_quantizer(TOKEN, 4096, find_device("cpu"), "xla") is None
