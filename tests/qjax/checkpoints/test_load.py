"""A model that was saved is the model that is loaded; a folder that cannot be read says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import qjax
import qjax.nnx
from qjax.checkpoints import CheckpointFiles
from qjax.checkpoints.load import load, with_activations
from qjax.checkpoints.save import save
from qjax.errors import CheckpointError, SchemeError, ShardingError
from qjax.explain import layers
from qjax.models import Llama, load_tokenizer
from qjax.qtensor import QTensor

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
IDS = jnp.arange(24).reshape(2, 12) * 7


@nnx.jit
def logits(model: Llama) -> jax.Array:
    return model(IDS)


@pytest.fixture(scope="module")
def dense() -> Llama:
    return load(PYLM)


@pytest.fixture(scope="module")
def int4() -> Llama:
    return qjax.nnx.quantize(load(PYLM), "w4a16")


@pytest.fixture(scope="module")
def int4_folder(int4: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "model"
    save(int4, folder, source=PYLM)
    return folder


@pytest.fixture
def copy(int4_folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(int4_folder, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_dense_folder_loads_in_the_dtype_that_suits_the_device(dense: Llama) -> None:
    assert dense.dtype == jnp.float32  # a CPU
    with qjax.use(device="H200"):
        assert load(PYLM).dtype == jnp.bfloat16
    with qjax.use(device="T4"):
        assert load(PYLM).dtype == jnp.float16
        assert load(PYLM, dtype="float32").dtype == jnp.float32


def test_no_tokenizer_is_needed(int4_folder: Path, tmp_path: Path, int4: Llama) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(int4_folder / name, tmp_path)
    np.testing.assert_array_equal(logits(load(tmp_path)), logits(int4))


def test_a_quantized_model_comes_back_to_the_bit(int4: Llama, int4_folder: Path) -> None:
    again = load(int4_folder)
    found, expected = (jax.tree.leaves(nnx.state(model)) for model in (again, int4))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(logits(again), logits(int4))


def test_a_dense_model_comes_back_too(dense: Llama, tmp_path: Path) -> None:
    save(dense, tmp_path / "out", source=PYLM)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    files, original = (CheckpointFiles.open(folder) for folder in (tmp_path / "out", PYLM))
    assert files.names() == original.names()
    for name in files:
        np.testing.assert_array_equal(files[name], original[name])


def test_mixed_rules_and_a_quantized_table_come_back(tmp_path: Path) -> None:
    rules = {"embed_tokens": "w8a16", "layers/0/mlp/.*": "nf4:double_quant=true", ".*q_proj": "nvfp4"}
    model = qjax.nnx.quantize(load(PYLM), rules)
    save(model, tmp_path / "out", source=PYLM)
    again = load(tmp_path / "out")
    assert type(again.embed_tokens) is qjax.nnx.QEmbed
    np.testing.assert_array_equal(logits(again), logits(model))


def test_the_tokenizer_and_the_settings_go_along(int4_folder: Path) -> None:
    text = "def f(x):\n    return x"
    assert load_tokenizer(int4_folder).encode(text) == load_tokenizer(PYLM).encode(text)
    for name in ("generation_config.json", "LICENSE-python.txt"):
        assert (int4_folder / name).read_bytes() == (PYLM / name).read_bytes()
    assert not (int4_folder / "eval.txt").exists()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (int4_folder, PYLM))
    assert config.pop("quantization_config")["quant_method"] == "qjax"
    assert config == original


def test_an_existing_folder_is_kept_unless_overwritten(int4: Llama, dense: Llama, copy: Path) -> None:
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(dense, copy, source=PYLM)
    assert (copy / "model.safetensors").read_bytes() == before
    save(dense, copy, source=PYLM, overwrite=True)
    assert not any(isinstance(layer.kernel, QTensor) for layer in layers(load(copy)))


def test_a_write_that_dies_midway_leaves_the_old_folder_and_nothing_else(
    int4: Llama, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "model.safetensors").read_bytes()

    def dies(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("qjax.checkpoints.write._write_tensors", dies)
    with pytest.raises(OSError, match="no space left"):
        save(int4, copy, source=PYLM, overwrite=True)
    assert (copy / "model.safetensors").read_bytes() == before
    assert [folder.name for folder in copy.parent.iterdir()] == [copy.name]


def test_only_a_model_whose_tensors_have_names_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"takes a qjax.models.Llama.*got Linear"):
        save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "out", source=PYLM)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip"}, "quant_method='quip'; expected one of .*qjax"),
        ({"bits": 4}, "key 'quant_method' is missing; expected one of .*qjax"),
        ([], "quantization_config is list; expected an object"),
    ],
    ids=str,
)
def test_a_format_that_is_not_known_is_named_with_those_that_are(config: Any, message: str, copy: Path) -> None:
    change_config(copy, quantization_config=config)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


UP = "model.layers.0.mlp.up_proj.weight"


def test_scales_that_are_nan_are_named_and_counted(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors[f"{UP}.scale"].__setitem__((slice(2), 0), np.nan))
    with pytest.raises(CheckpointError, match=rf"{UP}\.scale: 2 of 1536 values are NaN or infinite"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.scale"), rf"'{UP}\.scale' is missing"),
        (lambda t: t.update({f"{UP}.extra": np.zeros(1)}), rf"unexpected {UP}\.extra"),
        (lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"][:5]}), r"scale has shape \(5, 2\).* ask for \(768, 2\)"),
        (lambda t: t.update({f"{UP}.packed": t[f"{UP}.packed"].astype(np.int32)}), "packed has dtype int32"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": np.zeros((1, 1))}), "belong to no part"),
    ],
    ids=["missing", "extra", "shape", "dtype", "stranger"],
)
def test_a_tensor_that_does_not_fit_is_named(change: Any, message: str, copy: Path) -> None:
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_weight_of_another_size_than_the_configs_is_named(copy: Path) -> None:
    change_config(copy, intermediate_size=512)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight: shape .*the config asks for"):
        load(copy)


def test_activations_can_be_left_out_or_added(int4_folder: Path, tmp_path: Path) -> None:
    schemes = {str(layer.kernel.scheme) for layer in layers(load(int4_folder, activations="int8"))}
    assert schemes == {"w4a8_int8:group_size=128"}
    model = qjax.nnx.quantize(load(PYLM), "w8a8_fp8:granularity=tensor")
    save(model, tmp_path / "out", source=PYLM)
    as_stored, without = load(tmp_path / "out"), load(tmp_path / "out", activations="none")
    assert {str(layer.kernel.scheme) for layer in layers(as_stored)} == {"w8a8_fp8:granularity=tensor"}
    assert {str(layer.kernel.scheme) for layer in layers(without)} == {"fp8:granularity=tensor"}
    weight_only = qjax.nnx.quantize(load(PYLM), "fp8:granularity=tensor")
    np.testing.assert_array_equal(logits(without), logits(weight_only))


@pytest.mark.parametrize(
    ("stored", "activations", "expected"),
    [
        ("w8a16:group_size=128", "int8", "w8a8_int8:group_size=128"),
        ("w8a8_int8:activation=tensor", "none", "w8a16"),
        ("w8a8_int8:activation=tensor", "int8", "w8a8_int8:activation=tensor"),
        ("w4a8_int8:group_size=32,mode=static", "none", "w4a16:group_size=32"),
        ("fp8:format=e5m2", "fp8", "w8a8_fp8:format=e5m2"),
        ("nf4", "none", "nf4"),
        ("nf4", "checkpoint", "nf4"),
    ],
)
def test_a_scheme_with_other_activations_keeps_its_weights(stored: str, activations: str, expected: str) -> None:
    w = qjax.quantize_array(jnp.ones((256, 128)), stored)
    got = with_activations(w, activations, "here")
    assert got.scheme == qjax.parse_scheme(expected)
    np.testing.assert_array_equal(got.dequantize(), w.dequantize())


def test_activations_that_cannot_be_are_refused(int4_folder: Path) -> None:
    with pytest.raises(SchemeError, match="activations='int3'; allowed: checkpoint, none, int8, fp8"):
        load(int4_folder, activations="int3")
    with pytest.raises(SchemeError, match="w4a16 with activations='fp8'; there are .*fp8 with fp8"):
        load(int4_folder, activations="fp8")
    with pytest.raises(SchemeError, match="these are dense"):
        load(PYLM, activations="int8")


@pytest.mark.parametrize("axes", [("model",), ("fsdp",)])
def test_a_mesh_places_packed_weights_and_changes_nothing(
    axes: tuple[str, ...], int4: Llama, int4_folder: Path
) -> None:
    mesh = jax.make_mesh((2,), axes, (jax.sharding.AxisType.Auto,))
    model = load(int4_folder, mesh=mesh)
    up = model.layers[0].mlp.up_proj.kernel.get_value()
    assert up.packed.sharding.spec == (P("model", None, None) if axes == ("model",) else P(None, "fsdp", None))
    np.testing.assert_allclose(logits(model), logits(int4), atol=2e-4)


def test_a_mesh_that_cuts_a_group_names_the_layer(int4_folder: Path) -> None:
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ShardingError, match=r"mlp\.\w+_proj.weight"):
        load(int4_folder, mesh=mesh)


@pytest.mark.parametrize(("axis", "warnings"), [("batch", 1), ("model", 0)])
def test_a_mesh_that_cuts_no_weight_is_warned_of(axis: str, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    mesh = jax.make_mesh((2,), (axis,), (jax.sharding.AxisType.Auto,))
    with caplog.at_level("WARNING", logger="absl"):
        load(PYLM, mesh=mesh)
    found = [record.getMessage() for record in caplog.records if "over which weights are cut" in record.getMessage()]
    assert found == warnings * [
        "the mesh has axes batch and none of fsdp, model, over which weights are cut: "
        "each of its 2 devices gets all of them"
    ]
