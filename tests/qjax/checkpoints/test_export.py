"""Folders for other tools, read by what is not ours: decoders written here by the definitions, and the tools."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import qjax
import qjax.nnx
from qjax.calibration import windows
from qjax.explain import layers

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"

SCHEMES = ["w4a16", "w4a16:group_size=32,symmetric=false", "w8a16:group_size=64", "w3a16"]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys() if "embed" not in name and "norm" not in name}  # noqa: SIM118


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 `[R, W]` -> the numbers of so many bits in each row's little-endian stream, `[R, 32 W / bits]`."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def gptq(folder: Path, module: str, bits: int, *, less: int = 1) -> np.ndarray:
    """`[K, N]`: `(q - (z + less)) s`, codes along K in each column, zero points along N, groups by `g_idx`."""
    t = {name.removeprefix(f"{module}."): a for name, a in tensors_of(folder).items() if name.startswith(f"{module}.")}
    q = fields(t["qweight"].T, bits).T
    zero = (fields(t["qzeros"], bits) + less) % 2**bits
    return (q - zero[t["g_idx"]]) * t["scales"].astype(np.float64)[t["g_idx"]]


def compressed(folder: Path, module: str, bits: int) -> np.ndarray:
    """`[K, N]`: `(q - z) s`, codes along K in each row, zero points along N, groups in order or by `weight_g_idx`."""
    t = {name.removeprefix(f"{module}."): a for name, a in tensors_of(folder).items() if name.startswith(f"{module}.")}
    n, k = t["weight_shape"]
    q = fields(t["weight_packed"], bits)[:n, :k]
    scale = t["weight_scale"].astype(np.float64)
    group = t.get("weight_g_idx", np.arange(k) // (k // scale.shape[1]))
    zero = np.full(scale.shape, 2 ** (bits - 1))
    if "weight_zero_point" in t:
        zero = fields(t["weight_zero_point"].T, bits).T[:n]
    return ((q - zero[:, group]) * scale[:, group]).T


DECODERS = {"gptq": gptq, "gptq_v2": partial(gptq, less=0), "compressed-tensors": compressed}


def check(model: Any, folder: Path, to: str) -> None:
    qjax.save(model, folder, source=PYLM, format=to)
    for layer in layers(model):
        if not isinstance(layer.kernel, qjax.QTensor):
            continue
        got = DECODERS[to](folder, f"model.{layer.path.replace('/', '.')}", layer.kernel.scheme.bits)
        np.testing.assert_array_equal(got.astype(np.float32), layer.kernel.dequantize(jnp.float32), layer.path)


@pytest.mark.parametrize("to", DECODERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_formats_definition_gives_the_weights(scheme: str, to: str, tmp_path: Path) -> None:
    check(qjax.nnx.quantize(qjax.load(PYLM), {"layers/0/mlp/.*": scheme}), tmp_path / "out", to)


@pytest.mark.parametrize("to", DECODERS)
def test_groups_in_the_order_of_activations_are_told_by_g_idx(to: str, tmp_path: Path) -> None:
    ids = windows(np.arange(256) * 13 % 4096, window=64, count=4)
    model = qjax.calibrate(qjax.load(PYLM), ids, "gptq", {"layers/0/self_attn/.*": "w4a16:group_size=64"})
    assert model.layers[0].self_attn.q_proj.kernel.get_value().input_perm is not None
    check(model, tmp_path / "out", to)


WHY = "to read the folder by the tool that it is for takes torch, transformers and compressed-tensors"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16:group_size=32,symmetric=false", "w3a16", "w8a16:group_size=64"])
def test_compressed_tensors_unpacks_the_weights(scheme: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=WHY)
    tool = pytest.importorskip("compressed_tensors.compressors", reason=WHY)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=WHY)
    model = qjax.nnx.quantize(qjax.load(PYLM), {"layers/0/mlp/.*": scheme})
    qjax.save(model, tmp_path / "out", source=PYLM, format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    asked = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    module = "model.layers.0.mlp.up_proj."
    state = {k.removeprefix(module): a for k, a in tensors_of(tmp_path / "out").items() if k.startswith(module)}
    found = tool.PackedQuantizationCompressor.decompress({k: torch.tensor(a) for k, a in state.items()}, asked)
    w = model.layers[0].mlp.up_proj.kernel.get_value()
    np.testing.assert_allclose(found["weight"].float().numpy().T, w.dequantize(jnp.float32), rtol=2e-3, atol=1e-6)


# compressed-tensors 0.20 packs zero points, and expects them unpacked where transformers makes a model without memory:
# it refuses asymmetric folders, its own too.
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16:group_size=64"])
def test_transformers_runs_a_compressed_tensors_folder(scheme: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("compressed_tensors", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    folder = tmp_path / "out"
    qjax.save(qjax.nnx.quantize(qjax.load(PYLM), scheme), folder, source=PYLM, format="compressed-tensors")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    ids = np.arange(24).reshape(2, 12) * 7
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(qjax.load(folder, dtype="float32")(jnp.asarray(ids)), np.float32)
    np.testing.assert_allclose(ours, wanted, atol=1e-3 * float(np.abs(wanted).max()))


# GPTQModel 7.7 refuses folders of version 1 with zero points that it has not written itself.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "to"),
    [("w4a16", "gptq"), ("w8a16:group_size=64", "gptq"), ("w4a16", "gptq_v2"), ("w4a16:symmetric=false", "gptq_v2")],
)
def test_gptqmodel_runs_a_gptq_folder(scheme: str, to: str, tmp_path: Path) -> None:
    why = "to read the folder by the tool that it is for takes torch and gptqmodel"
    torch, tool = pytest.importorskip("torch", reason=why), pytest.importorskip("gptqmodel", reason=why)
    folder = tmp_path / "out"
    qjax.save(qjax.nnx.quantize(qjax.load(PYLM), scheme), folder, source=PYLM, format=to)
    ids = np.arange(24).reshape(2, 12) * 7
    theirs = tool.GPTQModel.load(str(folder), backend=tool.BACKEND.TORCH, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        wanted = theirs.model(torch.tensor(ids)).logits.float().numpy()
    ours = np.asarray(qjax.load(folder, dtype="float32")(jnp.asarray(ids)), np.float32)
    np.testing.assert_allclose(ours, wanted, atol=1e-2 * float(np.abs(wanted).max()))  # float16 throughout
