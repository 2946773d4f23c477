"""Experts of gpt-oss in MXFP4: weights by their definition, and the layer's output."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.weights import convert_weights, read_weights
from qjax.checkpoints.write import write_folder
from qjax.cli.main import main
from qjax.errors import CheckpointError
from qjax.models.gpt_oss import load_experts

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E, H, INNER = 3, 64, 96


def folder_of(tmp_path: Path, scales: np.ndarray | None = None) -> tuple[Path, dict[str, np.ndarray]]:
    """A layer of random codes, and its dense weights `[E, K, N]`."""
    rng = np.random.default_rng(0)
    tensors, dense = {}, {}
    for name, n, k in (("gate_up_proj", 2 * INNER, H), ("down_proj", H, INNER)):
        codes = rng.integers(0, 16, (E, n, k))
        exponents = (
            rng.integers(120, 128, (E, n, k // 32)) if scales is None else np.broadcast_to(scales, (E, n, k // 32))
        )
        prefix = f"model.layers.0.mlp.experts.{name}"
        tensors[f"{prefix}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(E, n, -1, 16)
        tensors[f"{prefix}_scales"] = exponents.astype(np.uint8)
        tensors[f"{prefix}_bias"] = rng.normal(size=(E, n)).astype(jnp.bfloat16)
        factor = np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, axis=-1)
        dense[name] = np.swapaxes(E2M1[codes] * factor, 1, 2)
        dense[f"{name}_bias"] = tensors[f"{prefix}_bias"].astype(np.float64)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    write_folder(tmp_path / "layer", tensors=tensors, config=config)
    return tmp_path / "layer", dense


def outputs(x: np.ndarray, dense: dict[str, np.ndarray]) -> np.ndarray:
    """Every expert's output, float64."""
    both = np.einsum("mk,ekn->emn", x, dense["gate_up_proj"]) + dense["gate_up_proj_bias"][:, None]
    gate, up = np.minimum(both[..., ::2], 7), np.clip(both[..., 1::2], -7, 7)
    inner = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return (np.einsum("emk,ekn->emn", inner, dense["down_proj"]) + dense["down_proj_bias"][:, None]).swapaxes(0, 1)


def test_experts_are_read_to_the_bit_and_give_the_output_of_their_formula(tmp_path: Path) -> None:
    folder, dense = folder_of(tmp_path)
    for name, w in read_weights(folder).items():
        np.testing.assert_array_equal(w.dequantize(jnp.float32), dense[name.rpartition(".")[2]])
    x = np.random.default_rng(1).normal(size=(5, H)).astype(np.float32)
    expected = outputs(x, dense)
    np.testing.assert_allclose(load_experts(folder)(jnp.asarray(x)), expected, atol=1e-5 * np.abs(expected).max())


def test_it_is_written_in_the_own_format_and_is_the_same_there(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    written = convert_weights(folder, tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").is_file()
    read = read_weights(tmp_path / "own")
    assert read.keys() == read_weights(folder).keys() == written.keys()
    for name, w in read.items():
        jax.tree.map(np.testing.assert_array_equal, w, written[name])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, H)), jnp.float32)
    np.testing.assert_array_equal(load_experts(tmp_path / "own")(x), load_experts(folder)(x))
    with pytest.raises(CheckpointError, match="exists"):
        convert_weights(folder, tmp_path / "own")


def test_the_command_converts_it_to_no_other_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = folder_of(tmp_path)
    assert main(["convert", str(folder), str(tmp_path / "own")]) == 0
    assert "mxfp4" in capsys.readouterr().out
    assert set(read_weights(tmp_path / "own")) == set(read_weights(folder))
    assert main(["convert", str(folder), str(tmp_path / "other"), "--to", "gptq"]) != 0
    assert "gpt_oss" in capsys.readouterr().err


def test_the_smallest_scale_is_kept(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, scales=np.uint8(0))
    scale = read_weights(folder)["model.layers.0.mlp.experts.down_proj"].scale
    np.testing.assert_array_equal(np.asarray(scale).astype(np.float64), 2.0**-127)  # subnormal in float32


def test_a_scale_that_is_nan_is_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, scales=np.uint8(255))
    with pytest.raises(CheckpointError, match=r"_scales': 576 of 576 values are NaN"):
        read_weights(folder)


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.5\.mlp\.experts\.gate_up_proj is missing; .*layers\.0"):
        load_experts(folder_of(tmp_path)[0], layer=5)


def test_a_layer_checked_with_other_decoders_gives_their_output() -> None:
    folder = Path(os.environ.get("QJAX_CHECKPOINTS", "nowhere")) / "mxfp4-gptoss-layer"
    if not folder.is_dir():
        pytest.skip("set QJAX_CHECKPOINTS to a folder of checkpoints; see docs/checkpoints.md")
    for name, w in np.load(folder / "reference.npz").items():
        found = read_weights(folder)[name].dequantize(jnp.float32)
        np.testing.assert_array_equal(np.swapaxes(found, -1, -2), w)
    extra = np.load(folder / "extra.npz")
    found, expected = load_experts(folder)(jnp.asarray(extra["x"])), extra["experts_out"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
