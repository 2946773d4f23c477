"""Folders for other tools, read by what is not ours: decoders written here by the definitions, and the tools."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

import qjax
import qjax.nnx
from qjax.calibration import windows
from qjax.explain import layers

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"

SCHEMES = ["w4a16", "w4a16:group_size=32,symmetric=false", "w8a16:group_size=64", "w3a16"]


NAMES = {
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, t in deserialize((folder / "model.safetensors").read_bytes()):
        if "embed" not in name and "norm" not in name:
            found[name] = np.frombuffer(t["data"], NAMES[t["dtype"]]).reshape(t["shape"])
    return found


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


def unpacked(folder: Path, module: str) -> np.ndarray:
    """`[K, N]`: `(q - z) s` of int- and float-quantized, codes as numbers, with a scale a tensor, row or block."""
    t = {name.removeprefix(f"{module}."): a for name, a in tensors_of(folder).items() if name.startswith(f"{module}.")}
    q = t["weight"].astype(np.float64)
    scale, zero = (
        np.zeros(1) if a is None else a.astype(np.float64) for a in (t["weight_scale"], t.get("weight_zero_point"))
    )
    if scale.size > 1:
        block = [-(-size // count) for size, count in zip(q.shape, scale.shape, strict=True)]
        scale = np.kron(scale, np.ones(block))
        zero = np.kron(zero, np.ones(block)) if zero.size > 1 else zero
    return ((q - zero) * scale).T


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


NUMBERS = [
    "w8a8_int8",
    "w8a8_int8:group_size=64,symmetric=false",
    "w8a8_int8:group_size=tensor,symmetric=false",
    "w4a8_int8",
    "w8a8_fp8",
    "fp8:granularity=tensor",
    "w8a8_fp8:granularity=block,activation=block",
]


@pytest.mark.parametrize("scheme", NUMBERS)
def test_codes_that_are_numbers_give_the_weights(scheme: str, tmp_path: Path) -> None:
    model = qjax.nnx.quantize(qjax.load(PYLM), {"layers/0/mlp/.*": scheme})
    qjax.save(model, tmp_path / "out", source=PYLM, format="compressed-tensors")
    for name in ("gate_proj", "down_proj"):
        w = getattr(model.layers[0].mlp, name).kernel.get_value()
        got = unpacked(tmp_path / "out", f"model.layers.0.mlp.{name}")
        np.testing.assert_array_equal(got.astype(np.float32), w.dequantize(jnp.float32), name)


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


# The tool divides by 127.5 where x has a scale of its own; codes of x that differ by one make up the rest.
@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    ["w8a8_int8", "w8a8_int8:mode=static", "w8a8_fp8", "w8a8_fp8:granularity=tensor,mode=static", "fp8", *NUMBERS[-1:]],
)
def test_transformers_runs_a_folder_that_quantizes_x(scheme: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("compressed_tensors", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    folder, ids = tmp_path / "out", np.arange(24).reshape(2, 12) * 7
    model = qjax.calibrate(qjax.load(PYLM), [ids], "nearest", scheme)
    qjax.save(model, folder, source=PYLM, format="compressed-tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    layer = theirs.model.layers[0].mlp.up_proj
    assert (layer.quantization_scheme.input_activations is None) == (scheme == "fp8")
    w = model.layers[0].mlp.up_proj.kernel.get_value()
    np.testing.assert_array_equal(layer.weight.detach().numpy().T, w.dequantize(jnp.float32))
    ours = np.asarray(qjax.load(folder, dtype="float32")(jnp.asarray(ids)), np.float32)
    np.testing.assert_allclose(ours, wanted, atol=0.06 * float(np.abs(wanted).max()))


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
