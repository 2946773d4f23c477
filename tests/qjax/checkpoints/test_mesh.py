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

HIDDEN, INNER = 128, 192  # 192 / 4 = 48: no whole group, no whole block of 128
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
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


def llama(folder: Path, make: Any, options: dict[str, Any], **settings: Any) -> Path:
    """A Llama of one layer whose Linears are in a format of another tool."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for name, (n, k) in LINEARS.items():
        made = make(rng, n=n, k=k, **options)
        tensors |= {f"model.layers.0.{name}.{rest}": array for rest, array in made.tensors.items()}
        config["quantization_config"] = made.settings | settings
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.full(HIDDEN, 0.1, np.float16)
    tensors["model.embed_tokens.weight"] = rng.normal(size=(32, HIDDEN)).astype(np.float16)
    config |= dict(model_type="llama", vocab_size=32, hidden_size=HIDDEN, intermediate_size=INNER)
    config |= dict(num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True)
    write_folder(folder, tensors=tensors, config=config)
    return folder


@nnx.jit
def logits(model: Llama) -> jax.Array:
    return model(IDS)


@pytest.mark.parametrize(("make", "options"), FORMATS.values(), ids=FORMATS)
def test_four_devices_compute_what_one_does(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", make, options)
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
    model = qjax.load(llama(tmp_path / "model", make, options), dtype="bfloat16")
    rows = qjax.explain(model, device="H100", backend="triton").rows
    quantized = [row.kernel for row in rows if row.layer.endswith("_proj")]
    assert len(quantized) == len(LINEARS) and all(kernel.startswith("triton.") for kernel in quantized)


def test_biases_of_zeros_that_the_model_has_not_are_dropped_and_others_refused(tmp_path: Path) -> None:
    plain = llama(tmp_path / "plain", foreign.gptq, dict(bits=4, group=32))
    files = CheckpointFiles.open(plain)
    for value in (0, 1):
        tensors = {name: files[name] for name in files}
        tensors["model.layers.0.mlp.up_proj.bias"] = np.full(INNER, value, np.float16)
        write_folder(tmp_path / f"bias{value}", tensors=tensors, config=files.config)
    np.testing.assert_array_equal(logits(qjax.load(tmp_path / "bias0")), logits(qjax.load(plain)))
    with pytest.raises(CheckpointError, match=r"up_proj\.bias: the config asks for no bias"):
        qjax.load(tmp_path / "bias1")


def test_hints_for_other_libraries_are_reported_and_change_nothing(tmp_path: Path) -> None:
    made = (foreign.gptq, dict(bits=4, group=32))
    hints = dict(backend="auto", max_input_length=4096, tune_metadata={}, version=3, use_exllama=True)
    plain = qjax.load(llama(tmp_path / "plain", *made))
    model = qjax.load(llama(tmp_path / "hints", *made, **hints))
    np.testing.assert_array_equal(logits(model), logits(plain))
    assert plain.notes == ()
    said = str(qjax.explain(model))
    assert "backend='auto'" in said and "max_input_length=4096" in said


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
