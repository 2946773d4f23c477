"""Folders that QJAX writes for other tools are read back to the bit, and every format becomes QJAX's own."""

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
from qjax.checkpoints import CheckpointFiles
from qjax.checkpoints.save import save
from qjax.checkpoints.weights import read_weights
from qjax.cli.main import main
from qjax.errors import CheckpointError

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
    from qjax.checkpoints.save import WRITERS
    from qjax.checkpoints.write import write_folder

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
        ("w8a8_int8", "compressed-tensors", "has activations that are quantized"),
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
