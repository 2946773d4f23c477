"""`explain` says of every kernel in a model what dispatch will choose for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax import devices, kernel_call
from qjax.dispatch.choose import choose
from qjax.dispatch.routes import ROUTES
from qjax.errors import BackendError, QJaxError, QTensorError
from qjax.explain import explain, layers


class Model(nnx.Module):
    """Two linears, one of them used twice, and an embedding."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(16, 128, rngs=rngs)
        self.up = nnx.Linear(128, 256, rngs=rngs)
        self.down = nnx.List([nnx.Linear(256, 64, rngs=rngs)])
        self.again = self.up

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down[0](jax.nn.relu(self.up(x)))


def kernel(scheme: str, *shape: int) -> qjax.QTensor:
    return qjax.quantize_array(jax.random.normal(jax.random.key(0), shape or (256, 64)), scheme)


def test_a_module_has_a_row_for_each_kernel_quantized_or_not() -> None:
    model = qjax.nnx.quantize(Model(), {"down/0": "w4a16:group_size=64"})
    rows = {row.layer: row for row in explain(model, 3).rows}
    assert rows.keys() == {"again", "down.0"}  # `up` is `again`
    assert rows["down.0"].cells[1:3] == ("3 x 256 x 64", "w4a16:group_size=64")
    assert rows["again"].cells[1:] == ("3 x 128 x 256", "float32", "jax", "not quantized")


def test_a_params_tree_has_a_row_for_each_kernel_and_none_for_a_bias() -> None:
    params = {
        "params": {
            "a": {"kernel": kernel("nf4"), "bias": jnp.zeros(64)},
            "b": {"kernel": jnp.zeros((2, 8, 4), jnp.bfloat16)},
        }
    }
    rows = explain(params, 5).rows
    assert [row.cells[:3] for row in rows] == [
        ("params/a/kernel", "5 x 256 x 64", "nf4"),
        ("params/b/kernel", "(2, 8, 4)", "bfloat16"),
    ]


def test_a_stacked_tensor_is_one_row_with_its_batch() -> None:
    (row,) = explain(kernel("mxfp4", 3, 256, 64)).rows
    assert row.cells[:3] == ("-", "3 * 1 x 256 x 64", "mxfp4")


def test_shapes_are_enough() -> None:
    abstract = jax.eval_shape(lambda: {"kernel": kernel("w8a16")})
    assert explain(abstract).rows == explain({"kernel": kernel("w8a16")}).rows


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16:symmetric=false", "nf4:double_quant=true", "w8a8_int8", "w8a8_fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_explained_is_what_runs(scheme: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernel_call, "choose", lambda *given: asked.append(given[0]) or choose(*given))
    explained = []
    monkeypatch.setattr("qjax.dispatch.explain.choose", lambda *given: explained.append(given[0]) or choose(*given))
    w = kernel(scheme)
    qjax.matmul(jnp.ones((7, 256), dtype), w)
    explain(w, 7, x_dtype=dtype)
    assert explained == asked[:1]


def test_an_input_order_is_no_hindrance_since_x_is_permuted_before_the_product() -> None:
    w = dataclasses.replace(kernel("w4a16"), input_perm=jnp.arange(256, dtype=jnp.int32))
    assert explain(w).rows == explain(kernel("w4a16")).rows


def test_every_kernel_that_was_not_taken_has_a_reason() -> None:
    found = explain(kernel("w4a16"), device="H200")
    names = {found.rows[0].kernel, *(name for name, _ in found.rows[0].others)}
    assert names == {route.name for route in ROUTES}
    assert all(reason for _, reason in found.rows[0].others)


def test_a_device_is_a_name_or_a_row_and_the_one_at_hand_by_default() -> None:
    w = kernel("w4a16")
    assert explain(w, device="h200").device is explain(w, device=devices.find_device("H200")).device
    assert explain(w).device == devices.current()
    with qjax.use(device="T4"):
        assert explain(w).device.name == "T4"


def test_the_modules_own_backend_counts_and_its_meaning_is_noted() -> None:
    layer = qjax.nnx.QLinear.from_qtensor(kernel("w4a16"), backend="marlin")
    assert any("'marlin'" in note for note in explain(layer).notes)
    layer = qjax.nnx.QLinear.from_qtensor(kernel("w4a16"), backend="torch")
    assert explain(layer).rows[0].reason.startswith("asked for")


def test_a_backend_that_cannot_names_the_layer() -> None:
    with pytest.raises(BackendError, match="^again: .*'cublaslt' cannot run"):
        explain(qjax.nnx.quantize(Model(), "w4a16"), device="CPU", backend="cublaslt")
    with pytest.raises(BackendError, match="unknown backend 'quick'"):
        explain(kernel("w4a16"), backend="quick")


def test_who_quantizes_x_is_noted() -> None:
    w8a8 = kernel("w8a8_int8")
    assert "x as int8, dynamic, a scale a token: triton.quantize_rows" in explain(w8a8, device="H200").notes
    assert "x as int8, dynamic, a scale a token: XLA, by the formula" in explain(w8a8, device="T4").notes
    assert not explain(kernel("w4a16"), device="H200").notes


def test_an_unknown_device_and_a_thing_without_kernels_are_errors() -> None:
    with pytest.raises(QJaxError, match="unknown device 'H300'"):
        explain(kernel("w4a16"), device="H300")
    with pytest.raises(QTensorError, match="dict holds no QTensor and no kernel"):
        explain({"bias": np.zeros(3)})


def test_it_prints_a_line_for_each_layer_below_the_device() -> None:
    text = str(explain(qjax.nnx.quantize(Model(), "w4a16"), device="H200")).splitlines()
    assert text[0].startswith("on H200")
    assert text[2].startswith("again") and text[3].startswith("down.0")


def test_layers_are_found_with_what_their_modules_say() -> None:
    found = {layer.path: layer for layer in layers(qjax.nnx.quantize(Model(), "w8a16"))}
    assert found["down.0"].kernel.shape == (256, 64)
    assert found["down.0"].backend is None
