"""Folders that QJAX writes for other tools are read back to the bit, and every format becomes QJAX's own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
import qjax.nnx
from qjax.checkpoints import CheckpointFiles, compressed_tensors_write
from qjax.checkpoints.save import WRITERS, save
from qjax.checkpoints.weights import read_weights
from qjax.checkpoints.write import write_folder
from qjax.cli.main import main
from qjax.errors import CheckpointError
from qjax.explain import layers
from qjax.qtensor import is_qtensor
from qjax.quantize import quantize_array

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
SMALL = Path(__file__).parents[2] / "data" / "checkpoints"


def dequantized(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(w.dequantize(jnp.float32)) for name, w in read_weights(folder).items()}


def assert_same(first: Path, second: Path) -> None:
    a, b = dequantized(first), dequantized(second)
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("to", ["qjax", "gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize(
    "scheme",
    ["w4a16", "w4a16:group_size=32,symmetric=false", "w8a16", "w8a16:group_size=64,symmetric=false", "w3a16", "w2a16"],
)
def test_what_qjax_quantizes_is_written_and_read_to_the_bit(scheme: str, to: str, tmp_path: Path) -> None:
    model = qjax.nnx.quantize(qjax.load(PYLM), {"layers/[01]/.*": scheme})
    save(model, tmp_path / "ours", source=PYLM)
    save(model, tmp_path / "theirs", source=PYLM, format=to)
    assert_same(tmp_path / "ours", tmp_path / "theirs")


def made(scheme: str, where: str) -> Any:
    """A Llama with layers of a scheme, scales of x too where it has static ones."""
    if "static" not in scheme:
        return qjax.nnx.quantize(qjax.load(PYLM), {where: scheme})
    return qjax.calibrate(qjax.load(PYLM), [np.arange(64).reshape(1, 64) * 13], "nearest", {where: scheme})


def kernels(model: Any) -> dict[str, Any]:
    """The layers' kernels, what they dequantize to left out: other tools' files don't say."""
    found = {layer.path: layer.kernel for layer in layers(model)}
    return {
        path: dataclasses.replace(w, dtype=np.dtype("float32")) if is_qtensor(w) else w for path, w in found.items()
    }


def assert_equal_models(first: Path, second: Path) -> None:
    """Two folders load to equal QTensors, their schemes too, and to equal logits."""
    models = [qjax.load(folder) for folder in (first, second)]
    a, b = (kernels(model) for model in models)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    ids = jnp.arange(24).reshape(2, 12) * 7
    np.testing.assert_array_equal(models[1](ids), models[0](ids))


# Scheme -> the format; what a scale of the weight covers, and one of x; tensors of a layer of 768 x 256, besides codes.
KINDS: dict[str, tuple[str, str, tuple[str, str, bool] | None, dict[str, tuple[int, ...]]]] = {
    "w8a8_int8": ("int-quantized", "channel", ("int", "token", True), {"weight_scale": (768, 1)}),
    "w8a8_int8:mode=static": (
        "int-quantized",
        "channel",
        ("int", "tensor", False),
        {"weight_scale": (768, 1), "input_scale": (1,)},
    ),
    "w8a8_int8:group_size=64,symmetric=false,scale_dtype=bfloat16": (
        "int-quantized",
        "group",
        ("int", "token", True),
        {"weight_scale": (768, 4), "weight_zero_point": (768, 4)},
    ),
    "w8a8_int8:activation=tensor": (
        "int-quantized",
        "channel",
        ("int", "tensor", True),
        {"weight_scale": (768, 1)},
    ),
    "w4a8_int8": ("int-quantized", "group", ("int", "token", True), {"weight_scale": (768, 2)}),
    "w8a8_fp8": ("float-quantized", "channel", ("float", "token", True), {"weight_scale": (768, 1)}),
    "w8a8_fp8:granularity=tensor,mode=static": (
        "float-quantized",
        "tensor",
        ("float", "tensor", False),
        {"weight_scale": (1,), "input_scale": (1,)},
    ),
    "w8a8_fp8:granularity=block,activation=block": (
        "float-quantized",
        "block",
        ("float", "group", True),
        {"weight_scale": (6, 2)},
    ),
    "fp8": ("float-quantized", "channel", None, {"weight_scale": (768, 1)}),
    "fp8:granularity=tensor": ("float-quantized", "tensor", None, {"weight_scale": (1,)}),
}


@pytest.mark.parametrize("scheme", KINDS)
def test_compressed_tensors_has_a_place_for_x_in_8_bits_and_for_e4m3(scheme: str, tmp_path: Path) -> None:
    form, strategy, x, tensors = KINDS[scheme]
    model = made(scheme, "layers/0/mlp/(up|down)_proj")
    save(model, tmp_path / "ours", source=PYLM)
    save(model, tmp_path / "theirs", source=PYLM, format="compressed-tensors")
    assert_equal_models(tmp_path / "ours", tmp_path / "theirs")

    files, module = CheckpointFiles.open(tmp_path / "theirs"), "model.layers.0.mlp.up_proj"
    names = [name for name in files if name.startswith(module)]
    assert {name.removeprefix(f"{module}."): files.shape(name) for name in names} == {"weight": (768, 256), **tensors}
    assert files.dtype(f"{module}.weight").name == ("int8" if form == "int-quantized" else "float8_e4m3fn")

    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    asked = group["input_activations"]
    assert (config["quant_method"], config["quantization_status"]) == ("compressed-tensors", "compressed")
    assert config["format"] == group["format"] == form
    assert group["weights"]["strategy"] == strategy
    assert group["weights"]["block_structure"] == ([128, 128] if strategy == "block" else None)
    assert (asked and (asked["type"], asked["strategy"], asked["dynamic"])) == x
    assert (asked and asked["group_size"]) == (128 if x == ("float", "group", True) else None)
    assert {"lm_head", "model.layers.1.mlp.up_proj"} <= set(config["ignore"])


def test_smoothquant_writes_what_it_folded(tmp_path: Path) -> None:
    ids = np.arange(128, dtype=np.int32).reshape(2, 64)
    model = qjax.calibrate(qjax.load(PYLM), [ids], "smoothquant", {"layers/0/.*": "w8a8_int8"})
    save(model, tmp_path / "ours", source=PYLM)
    save(model, tmp_path / "theirs", source=PYLM, format="compressed-tensors")
    assert_equal_models(tmp_path / "ours", tmp_path / "theirs")
    norm = "model.layers.0.input_layernorm.weight"
    assert not np.array_equal(CheckpointFiles.open(tmp_path / "theirs")[norm], CheckpointFiles.open(PYLM)[norm])


@pytest.mark.parametrize("scheme", ["w8a8_int8", "w8a8_int8:symmetric=false", "w8a16"])
def test_one_scale_of_a_tensor_is_read_as_one_a_row(scheme: str, tmp_path: Path) -> None:
    whole = scheme + ("," if ":" in scheme else ":") + "group_size=tensor"
    save(made(whole, "layers/0/mlp/.*"), tmp_path / "ours", source=PYLM)
    save(qjax.load(tmp_path / "ours"), tmp_path / "theirs", source=PYLM, format="compressed-tensors")
    assert_same(tmp_path / "ours", tmp_path / "theirs")
    assert {w.scheme.spec for w in read_weights(tmp_path / "theirs").values()} == {scheme}


def test_kinds_of_several_formats_are_mixed_precision(tmp_path: Path) -> None:
    rules = {"layers/0/mlp/.*": "w8a8_fp8", "layers/0/.*": "w4a16", "layers/1/.*": "w8a8_int8"}
    model = qjax.nnx.quantize(qjax.load(PYLM), rules)
    save(model, tmp_path / "ours", source=PYLM)
    save(model, tmp_path / "theirs", source=PYLM, format="compressed-tensors")
    assert_equal_models(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    formats = [group["format"] for group in config["config_groups"].values()]
    assert sorted(formats) == ["float-quantized", "int-quantized", "pack-quantized"]


@pytest.mark.parametrize("scale_dtype", ["float32", "float8_e8m0fnu"])
def test_fp8_folders_of_any_scales_become_compressed_tensors(scale_dtype: str, tmp_path: Path) -> None:
    given = foreign.fp8(np.random.default_rng(0), n=130, k=260, scale_dtype=scale_dtype)
    ((name, w),) = read_weights(foreign.write(tmp_path / "in", given)).items()
    tensors, settings = compressed_tensors_write.to_arrays(w, name), compressed_tensors_write.config({name: w}, [])
    write_folder(tmp_path / "out", tensors=tensors, config={"quantization_config": settings})
    assert_same(tmp_path / "in", tmp_path / "out")
    assert read_weights(tmp_path / "out")[name].scheme.activation == w.scheme.activation


@pytest.mark.parametrize("scheme", ["w8a8_int8", "w8a8_fp8:granularity=tensor"])
def test_columns_that_were_moved_are_where_x_has_them(scheme: str, tmp_path: Path) -> None:
    w = quantize_array(jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32), scheme)
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    moved = dataclasses.replace(w, packed=w.packed[:, order], input_perm=jnp.asarray(order))
    tensors = compressed_tensors_write.to_arrays(moved, "a")
    assert tensors.keys() == {"a.weight", "a.weight_scale"}
    np.testing.assert_array_equal(tensors["a.weight"], w.packed)
    weights = compressed_tensors_write.config({"a": moved}, [])["config_groups"]["group_0"]["weights"]
    assert weights["actorder"] is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_versions_of_gptq_load_to_equal_qtensors(bits: int, tmp_path: Path) -> None:
    model = qjax.nnx.quantize(qjax.load(PYLM), {"layers/0/.*": f"w{bits}a16:symmetric=false"})
    for version in ("gptq", "gptq_v2"):
        save(model, tmp_path / version, source=PYLM, format=version)
    first, second = (read_weights(tmp_path / version) for version in ("gptq", "gptq_v2"))
    assert first and jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    zeros = [CheckpointFiles.open(tmp_path / v)["model.layers.0.mlp.up_proj.qzeros"] for v in ("gptq", "gptq_v2")]
    assert not np.array_equal(*zeros)


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_modules_of_several_kinds_and_dense_ones_keep_their_kind(to: str, tmp_path: Path) -> None:
    rules = {"layers/0/mlp/.*": "w8a16:group_size=64", "layers/[01]/.*proj": "w4a16:symmetric=false"}
    model = qjax.nnx.quantize(qjax.load(PYLM), rules)
    save(model, tmp_path / "ours", source=PYLM)
    save(model, tmp_path / "theirs", source=PYLM, format=to)
    assert_same(tmp_path / "ours", tmp_path / "theirs")
    ids = jnp.arange(24).reshape(2, 12) * 7
    np.testing.assert_array_equal(qjax.load(tmp_path / "theirs")(ids), qjax.load(tmp_path / "ours")(ids))


@pytest.mark.parametrize("index", ["order", "random"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_act_order_survives_a_conversion(to: str, bits: int, index: str, tmp_path: Path) -> None:
    version = "gptq_v2" if to == "gptq_v2" else "gptq"
    made = foreign.gptq(np.random.default_rng(0), bits=bits, n=32, k=128, group=32, version=version, index=index)
    (name, w), *_ = read_weights(foreign.write(tmp_path / "in", made)).items()
    to_arrays, settings = WRITERS[to]
    config = {"quantization_config": settings({name: w}, [])}
    write_folder(tmp_path / "out", tensors=to_arrays(w, name), config=config)
    assert_same(tmp_path / "in", tmp_path / "out")
    if to == version:  # and as the tool would have written it
        files = CheckpointFiles.open(tmp_path / "out")
        for key, array in made.tensors.items():
            np.testing.assert_array_equal(files[f"{name}.{key}"], array)


def test_the_version_and_groups_that_other_tools_ask_for_are_in_the_config(tmp_path: Path) -> None:
    model = qjax.nnx.quantize(qjax.load(PYLM), {"layers/0/mlp/.*": "w8a16", "layers/./mlp/.*": "w4a16"})
    configs: dict[str, Any] = {}
    for to in ("gptq", "compressed-tensors"):
        save(model, tmp_path / to, source=PYLM, format=to)
        configs[to] = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
    gptq, ct = configs["gptq"], configs["compressed-tensors"]
    assert (gptq["quant_method"], gptq["checkpoint_format"], gptq["bits"], gptq["group_size"]) == (
        "gptq",
        "gptq",
        4,
        128,
    )
    assert gptq["dynamic"]["-:^model\\.layers\\.0\\.self_attn\\.q_proj$"] == {}
    assert gptq["dynamic"]["+:^model\\.layers\\.0\\.mlp\\.up_proj$"]["bits"] == 8
    assert [g["weights"]["num_bits"] for g in ct["config_groups"].values()] == [8, 4]
    assert "model.layers.0.self_attn.q_proj" in ct["ignore"]


@pytest.mark.parametrize(
    ("scheme", "to", "message"),
    [
        ("nf4", "gptq", r"up_proj: nf4 has nf4 weights; integer weights in groups of K are written"),
        ("nf4", "compressed-tensors", r"up_proj: nf4 has nf4 weights; integer .* and e4m3 weights are written"),
        ("w8a8_int8", "gptq", r"has activations that are quantized \(format=compressed-tensors has a place\)"),
        ("w8a8_int8:outliers=6", "compressed-tensors", r"columns of x that stay as they are \(the scheme without outl"),
        ("w8a8_int8:mode=static", "compressed-tensors", r"has no static scale of x \(act_scale= of qjax.calibrate"),
        ("w8a8_fp8:format=e5m2", "compressed-tensors", "has e5m2 weights; integer weights"),
        ("mxfp8", "compressed-tensors", "mxfp8 has blocks of 1 x 32; e4m3 weights with a scale a tensor, row or block"),
        ("fp8:granularity=block", "gptq", "e4m3 weights, blocks of 128 rows"),
        ("w5a16", "gptq", "5 bits; GPTQ has 2, 3, 4, 8"),
        ("w4a16", "marlin", "format='marlin'; known: qjax, gptq, gptq_v2, compressed-tensors"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(scheme: str, to: str, message: str, tmp_path: Path) -> None:
    model = qjax.nnx.quantize(qjax.load(PYLM), {".*up_proj": scheme})
    with pytest.raises(CheckpointError, match=message):
        save(model, tmp_path / "out", source=PYLM, format=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unfolded", ["keep", "skip"])
def test_factors_of_x_that_stay_with_a_layer_are_refused_with_the_way_to_have_none(unfolded, tmp_path: Path) -> None:
    batch = np.arange(128, dtype=np.int32).reshape(2, 64)
    rules = {".*0/mlp/down_proj": "w4a16"}  # up, which could take them up, stays as it is
    model = qjax.calibrate(qjax.load(PYLM), [batch], f"awq:clip=false,unfolded={unfolded}", rules)
    if unfolded == "keep":
        with pytest.raises(
            CheckpointError, match=r"0.mlp.down_proj: w4a16\S* has an input_scale .*unfolded=skip makes"
        ):
            save(model, tmp_path / "out", source=PYLM, format="gptq")
    else:
        save(model, tmp_path / "out", source=PYLM, format="gptq")
        assert read_weights(tmp_path / "out").keys() == {"model.layers.0.mlp.down_proj"}


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_a_llama_by_awq_has_its_factors_in_norms_and_linears_and_is_written(to: str, tmp_path: Path) -> None:
    batch = np.arange(128, dtype=np.int32).reshape(2, 64)
    model = qjax.calibrate(qjax.load(PYLM), [batch], "awq:clip=false", "w4a16:symmetric=false")
    save(model, tmp_path / "out", source=PYLM, format=to)
    np.testing.assert_allclose(qjax.load(tmp_path / "out")(batch)[0], model(batch)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["gptq-4b-g128", "bnb-nf4"])
def test_the_command_converts_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SMALL / name), str(tmp_path / "out")]) == 0
    assert "7" in capsys.readouterr().out
    assert_same(SMALL / name, tmp_path / "out")
    assert main(["convert", str(SMALL / name), str(tmp_path / "out")]) == 1
    assert "exists" in capsys.readouterr().err


def test_the_command_refuses_a_folder_that_is_not_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(PYLM), str(tmp_path / "out")]) == 1
    assert "nothing in it is quantized" in capsys.readouterr().err
