"""GGUF files of a Llama, made with the package `gguf`: codes are read as they are, rows of q and k are put back."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.weights import read_weights
from qjax.cli.main import main
from qjax.errors import CheckpointError
from qjax.explain import layers
from qjax.models.rope import angles
from qjax.qtensor import is_qtensor

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def their_name(name: str) -> str:
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.items():
        name = name.replace(ours, theirs)
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter puts them."""
    return w.reshape(heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def quantized(w: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a type; Q4_K, which the package cannot make, from random ones."""
    if kind != "Q4_K":
        found: np.ndarray = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
        return found
    blocks = rng.integers(0, 256, (len(w), w.shape[1] // 256, 144), dtype=np.uint8)
    small = rng.uniform(1e-4, 1e-3, (len(w), w.shape[1] // 256, 2)).astype("<f2")
    blocks[..., :4] = small.view(np.uint8)
    blocks[0, 0, 4] = 0  # a scale of zero beside a minimum
    return blocks.reshape(len(w), -1)


def write(path: Path, kind: str, **settings: Any) -> dict[str, np.ndarray]:
    """The file, and the weights `[N, K]` that its Linears stand for."""
    files, rng = CheckpointFiles.open(PYLM), np.random.default_rng(0)
    config, expected = files.config, {}
    writer = gguf.GGUFWriter(path, settings.pop("arch", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if (divisors := settings.pop("add_rope_freqs", None)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for key, value in settings.items():
        getattr(writer, key)(value)
    for name in files:
        w = files[name].astype(np.float32)
        if not name.endswith("proj.weight"):
            writer.add_tensor(their_name(name), w)
            continue
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}.get(name.split(".")[-2][0])
        raw = quantized(w if heads is None else interleaved(w, heads), kind, rng)
        writer.add_tensor(their_name(name), raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        dense = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        if heads is not None:
            dense = dense.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        expected[name.removesuffix(".weight").removeprefix("model.")] = dense
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(("kind", "tolerance"), [("Q8_0", 0.0), ("Q4_0", 0.0), ("Q4_K", 1e-6)])
def test_weights_are_those_of_the_package(kind: str, tolerance: float, tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", kind)
    found = {x.path.replace("/", "."): x.kernel for x in layers(qjax.load(tmp_path / "model.gguf"))}
    for name, w in expected.items():
        assert is_qtensor(found[name])
        values = np.asarray(found[name].dequantize(jnp.float32)).T
        np.testing.assert_allclose(values, w, rtol=0, atol=tolerance * np.abs(w).max())


def test_a_file_of_eight_bits_computes_what_the_folder_does(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "Q8_0")
    ids = jnp.arange(32).reshape(2, 16) * 7
    found, expected = qjax.load(tmp_path / "model.gguf")(ids), qjax.load(PYLM)(ids)
    np.testing.assert_allclose(found, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_a_file_becomes_a_folder(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", "Q4_0")
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"), "--to", "gptq"]) == 0
    for name, w in read_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(np.asarray(w.dequantize()).T, expected[name.removeprefix("model.")])


def test_types_that_have_no_codes_here_are_dequantized(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf", "Q5_0")
    for layer in layers(qjax.load(tmp_path / "model.gguf")):
        if (name := layer.path.replace("/", ".")) in expected:
            np.testing.assert_array_equal(np.asarray(layer.kernel).T, expected[name])


def test_what_is_no_llama_or_no_file_of_the_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", "Q8_0", arch="mamba")
    with pytest.raises(NotImplementedError, match="general.architecture='mamba'"):
        qjax.load(tmp_path / "other.gguf")
    (tmp_path / "text.gguf").write_bytes(b"not one" * 100)
    with pytest.raises(CheckpointError, match=r"text\.gguf: not a GGUF file"):
        qjax.load(tmp_path / "text.gguf")
    write(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "short.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        qjax.load(tmp_path / "short.gguf")
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read"):
        qjax.load(tmp_path / "none.gguf")


def test_frequencies_that_are_divided_turn_queries_and_keys_more_slowly(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 2, 8] * 4, np.float32)
    write(tmp_path / "model.gguf", "Q8_0", add_rope_freqs=divisors)
    write(tmp_path / "plain.gguf", "Q8_0")
    model, plain = qjax.load(tmp_path / "model.gguf"), qjax.load(tmp_path / "plain.gguf")
    positions = jnp.arange(6)[None]
    found, usual = (np.arctan2(*angles(m.config.rope, positions)[::-1]) for m in (model, plain))
    np.testing.assert_allclose(found[0, 1], usual[0, 1] / divisors, rtol=1e-6)
    write(tmp_path / "scaled.gguf", "Q8_0", add_rope_scaling_type=gguf.RopeScalingType.YARN)
    with pytest.raises(NotImplementedError, match="llama.rope.scaling.type='yarn'"):
        qjax.load(tmp_path / "scaled.gguf")
