"""Folders that the real tools wrote: weights, perplexity and logits are those of the tools' own dequantization."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.checkpoints.detect import source
from qjax.checkpoints.files import CheckpointFiles
from qjax.explain import layers
from qjax.models import Llama, load_tokenizer
from qjax.models.perplexity import perplexity
from qjax.qtensor import is_qtensor

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
WINDOWS = 20

# Folder -> the largest difference to the tool's float32 weights, relative to the largest of them.
ULP = 2.0**-23
FOLDERS = {
    "gptq-2b-g64": 0.0,
    "gptq-3b-g128": 0.0,
    "gptq-4b-g128-sym": 0.0,
    "gptq-4b-g32-asym-actorder": 0.0,
    "gptq-8b-g128": 0.0,
    "gptq-dynamic-mixed": 0.0,
    "gptq-v2-4b-g64-asym": 0.0,
    "awq-4b-g128": 0.0,
    "awq-4b-g64": 0.0,
    "awq-gemv-4b-g128": 0.0,
    "ct-w4a16-g128": 0.0,
    "ct-w4a16-g128-asym-actorder": 0.0,
    "ct-w3a16-g128": 0.0,
    "ct-w3a16-g128-padded": 0.0,
    "ct-w3a16-naive": 0.0,
    "ct-w8a8-int8": 0.0,
    "ct-fp8-static-tensor": 0.0,
    "ct-fp8-dynamic-channel": 0.0,
    "ct-fp8-block": 0.0,
    "ct-nvfp4": ULP,  # the tool divides by the global scale, which here multiplies
    "ct-mxfp4": 0.0,
    "fp8-finegrained": 0.0,
    "bnb-nf4": 0.0,
    "bnb-nf4-double": 0.0,
    "bnb-fp4": 0.0,
    "bnb-int8": ULP,  # the tool multiplies by the scale, then by 1/127
    "hqq-2b-g32-axis1": 0.0,
    "hqq-3b-g64-axis0": 0.0,
    "hqq-4b-g64-axis1": 0.0,
}

each_folder = pytest.mark.parametrize("name", FOLDERS)


def quantized(model: Llama) -> dict[str, np.ndarray]:
    """Module's name in a file -> its weight `[N, K]`, float32."""
    return {
        f"model.{layer.path.replace('/', '.')}": np.asarray(layer.kernel.dequantize(jnp.float32)).T
        for layer in layers(model)
        if is_qtensor(layer.kernel)
    }


def reference(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reference.json").read_text())
    return found


@each_folder
def test_weights_are_those_of_the_tool(name: str, real_folder: Callable[[str], Path]) -> None:
    folder = real_folder(name)
    weights, expected = quantized(qjax.load(folder, activations="none")), reference(folder)["tensors"]
    assert weights.keys() == expected.keys()
    for module, w in weights.items():
        wide = w.astype(np.float64)
        assert list(w.shape) == expected[module]["shape"]
        np.testing.assert_allclose(wide.sum(), expected[module]["sum"], atol=2e-7 * np.abs(wide).sum())
        np.testing.assert_allclose((wide**2).sum(), expected[module]["sumsq"], rtol=2e-7)
    for module, w in np.load(folder / "reference.npz").items():
        found = weights[module.removesuffix(".weight")]
        np.testing.assert_allclose(found, w, rtol=0, atol=FOLDERS[name] * np.abs(w).max())


@pytest.mark.slow
@each_folder
def test_perplexity_is_that_of_the_tool(name: str, real_folder: Callable[[str], Path]) -> None:
    folder = real_folder(name)
    text = (PYLM / "eval.txt").read_text()
    ids = load_tokenizer(PYLM).encode(text, add_special_tokens=False)
    found = perplexity(qjax.load(folder, activations="none"), ids, max_windows=WINDOWS)
    assert found.perplexity == pytest.approx(reference(folder)["perplexity"], rel=2e-3)


@pytest.mark.slow
@each_folder
def test_logits_are_those_of_a_float_model_with_the_same_weights(name: str, real_folder: Callable[[str], Path]) -> None:
    model = qjax.load(real_folder(name), activations="none")
    plain = qjax.load(real_folder(name), activations="none")
    for _, module in list(nnx.iter_modules(plain)):
        for attribute, child in list(vars(module).items()):
            if is_qtensor(getattr(getattr(child, "kernel", None), "get_value", lambda: None)()):
                setattr(module, attribute, _dense(child))
    ids = jnp.arange(64).reshape(2, 32) * 13
    found, expected = (np.asarray(_logits(m, ids)) for m in (model, plain))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@nnx.jit
def _logits(model: Llama, ids: jax.Array) -> jax.Array:
    return model(ids)


def _dense(layer: Any) -> nnx.Linear:
    """The Linear that a quantized layer stands for."""
    bias = layer.bias is not None
    linear = nnx.Linear(layer.in_features, layer.out_features, use_bias=bias, dtype=layer.dtype, rngs=nnx.Rngs(0))
    linear.kernel.set_value(layer.kernel.get_value().dequantize(jnp.float32))
    if linear.bias is not None:
        linear.bias.set_value(layer.bias.get_value())
    return linear


def test_scales_of_a_kv_cache_are_read_and_what_is_not_done_is_noted(real_folder: Callable[[str], Path]) -> None:
    opened = source(CheckpointFiles.open(real_folder("ct-fp8-static-tensor")))
    assert opened is not None
    scheme, scales = opened.notes
    assert scheme.startswith("kv_cache_scheme: ") and "scales of a KV cache, model.layers.0.self_attn." in scales


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-4b-g32-asym-actorder", "ct-w4a16-g128-asym-actorder", "awq-4b-g128", "bnb-nf4"])
def test_four_devices_compute_what_one_does(name: str, real_folder: Callable[[str], Path]) -> None:
    mesh = jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    one, four = (qjax.load(real_folder(name), activations="none", mesh=m) for m in (None, mesh))
    for layer in layers(four):
        if is_qtensor(layer.kernel):
            shards = [shard.data.size for shard in layer.kernel.packed.addressable_shards]
            assert shards == [layer.kernel.packed.size // 4] * 4
    whole = quantized(one)
    for module, w in quantized(four).items():
        np.testing.assert_array_equal(w, whole[module])
    ids = jnp.arange(64).reshape(2, 32) * 13
    found, expected = (np.asarray(_logits(model, ids)) for model in (four, one))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["ct-w8a8-int8", "ct-fp8-static-tensor", "ct-fp8-dynamic-channel", "ct-fp8-block", "fp8-finegrained"]
)
def test_folders_with_x_in_8_bits_are_written_and_read_again(
    name: str, real_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    read = qjax.load(real_folder(name))
    qjax.save(read, tmp_path / "out", source=real_folder(name), format="compressed-tensors")
    again = qjax.load(tmp_path / "out")
    first, second = ([layer.kernel for layer in layers(model)] for model in (read, again))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    ids = jnp.arange(24).reshape(2, 12) * 7
    np.testing.assert_array_equal(read(ids), again(ids))
