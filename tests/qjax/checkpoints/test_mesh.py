"""A checkpoint on a mesh computes what it computes on one device, whatever its groups; and hints are reported."""

import json
from pathlib import Path
from typing import Any

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.write import write_folder
from qjax.cli.main import main
from qjax.errors import CheckpointError
from qjax.explain import layers
from qjax.models import Llama
from qjax.qtensor import is_qtensor

IDS = jnp.arange(24).reshape(2, 12) % 32

FORMATS: dict[str, Any] = {
    "gptq act-order": (foreign.gptq, dict(bits=4, group=32, index="random")),
    "gptq act-order, 3 bits": (foreign.gptq, dict(bits=3, group=64, index="random")),
    "gptq 8 bits": (foreign.gptq, dict(bits=8, group=64)),
    "awq": (foreign.awq, dict(group=64)),
    "packed act-order": (foreign.ct_packed, dict(bits=4, group=64, symmetric=False, index="random")),
    "fp8 blocks": (foreign.fp8, dict()),
    "fp8 per channel": (foreign.ct_float, dict(strategy="channel")),
    "bnb double": (foreign.bnb, dict(nested=True)),
    "hqq": (foreign.hqq, dict(bits=4, group=64, axis=1)),
}


@nnx.jit
def logits(model: Llama) -> jax.Array:
    return model(IDS)


@pytest.mark.parametrize(("make", "options"), FORMATS.values(), ids=FORMATS)
def test_four_devices_compute_what_one_does(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    folder = foreign.llama(tmp_path / "model", make, options)
    one = qjax.load(folder, activations="none")
    mesh = jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    four = qjax.load(folder, activations="none", mesh=mesh)
    for layer, whole in zip(layers(four), layers(one), strict=True):
        if is_qtensor(layer.kernel):
            shards = [shard.data.size for shard in layer.kernel.packed.addressable_shards]
            assert shards == [layer.kernel.packed.size // 4] * 4
            np.testing.assert_array_equal(layer.kernel.dequantize(), whole.kernel.dequantize())
    found, expected = np.asarray(logits(four)), np.asarray(logits(one))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["gptq act-order", "gptq act-order, 3 bits", "awq", "packed act-order", "hqq"])
def test_fused_kernels_take_act_order_and_zero_points(name: str, tmp_path: Path) -> None:
    make, options = FORMATS[name]
    model = qjax.load(foreign.llama(tmp_path / "model", make, options), dtype="bfloat16")
    rows = qjax.explain(model, device="H100", backend="triton").rows
    quantized = [row.kernel for row in rows if row.layer.endswith("_proj")]
    assert len(quantized) == len(foreign.LINEARS) and all(kernel.startswith("triton.") for kernel in quantized)


def test_biases_of_zeros_that_the_model_has_not_are_dropped_and_others_refused(tmp_path: Path) -> None:
    plain = foreign.llama(tmp_path / "plain", foreign.gptq, dict(bits=4, group=32))
    files = CheckpointFiles.open(plain)
    for value in (0, 1):
        tensors = {name: files[name] for name in files}
        tensors["model.layers.0.mlp.up_proj.bias"] = np.full(foreign.INNER, value, np.float16)
        write_folder(tmp_path / f"bias{value}", tensors=tensors, config=files.config)
    np.testing.assert_array_equal(logits(qjax.load(tmp_path / "bias0")), logits(qjax.load(plain)))
    with pytest.raises(CheckpointError, match=r"up_proj\.bias: the config asks for no bias"):
        qjax.load(tmp_path / "bias1")


def test_hints_for_other_libraries_are_reported_and_change_nothing(tmp_path: Path) -> None:
    made = (foreign.gptq, dict(bits=4, group=32))
    hints = dict(backend="auto", max_input_length=4096, tune_metadata={}, version=3, use_exllama=True)
    plain = qjax.load(foreign.llama(tmp_path / "plain", *made))
    model = qjax.load(foreign.llama(tmp_path / "hints", *made, **hints))
    np.testing.assert_array_equal(logits(model), logits(plain))
    assert plain.notes == ()
    said = str(qjax.explain(model))
    assert "backend='auto'" in said and "max_input_length=4096" in said and "version=3: checkpoint_format" in said


def test_perplexity_is_with_and_without_what_a_folder_does_to_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pylm = Path(__file__).parents[3] / "examples" / "pylm-4m"
    model = qjax.load(pylm)
    qjax.save(qjax.nnx.quantize(model, "w8a8_int8"), tmp_path / "w8a8", source=pylm)
    text = tmp_path / "text"
    text.write_text((pylm / "eval.txt").read_text()[:6000])
    assert main(["perplexity", str(tmp_path / "w8a8"), "--text", str(text), "--windows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:2] == ["perplexity", "perplexity_activations"]
    assert found["perplexity"] != found["perplexity_activations"] == pytest.approx(found["perplexity"], rel=0.01)
