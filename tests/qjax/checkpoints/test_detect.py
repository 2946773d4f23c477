"""Which module is in which format: settings in any place they are kept, overrides, groups, ignore lists."""

import json
from pathlib import Path
from typing import Any

import foreign
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.compressed_tensors_weights import WEIGHTS
from qjax.checkpoints.detect import source
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.load import on_device
from qjax.checkpoints.source import Source
from qjax.checkpoints.write import write_folder
from qjax.errors import CheckpointError
from qjax.schemes import Activation

RNG = np.random.default_rng(0)
INT4 = foreign.ct_packed(RNG, bits=4, n=16, k=64, group=32)
FP8 = foreign.ct_float(RNG, n=16, k=64, strategy="channel")


def opened(folder: Path, modules: dict[str, foreign.Foreign], config: Any, **beside: Any) -> Source:
    """A folder of several modules; `beside` are other JSON files in it."""
    tensors = {f"{name}.{rest}": array for name, made in modules.items() for rest, array in made.tensors.items()}
    files = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
    write_folder(folder, tensors=tensors, config=config, extra_files=files)
    found = source(CheckpointFiles.open(folder))
    assert found is not None
    return found


def weight(found: Source, module: str) -> np.ndarray:
    read = found.read(module)
    assert read is not None
    return np.asarray(on_device(read[0]).dequantize(jnp.float32)).T


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (foreign.gptq(RNG, bits=4, n=32, k=64, group=32), "quantize_config"),
        (foreign.awq(RNG, n=32, k=64, group=32), "quant_config"),
    ],
)
def test_settings_that_older_tools_wrote_beside_the_config_are_found(
    made: foreign.Foreign, name: str, tmp_path: Path
) -> None:
    settings = {key: value for key, value in made.settings.items() if key not in ("quant_method", "bits", "group_size")}
    settings |= {"w_bit": 4, "q_group_size": 32}
    found = opened(tmp_path / "folder", {"m": made}, {}, **{name: settings})
    np.testing.assert_array_equal(weight(found, "m"), made.weight)


def test_the_older_key_of_compressed_tensors_is_found(tmp_path: Path) -> None:
    settings = {key: value for key, value in INT4.settings.items() if key != "quant_method"}
    found = opened(tmp_path / "folder", {"m": INT4}, {"compression_config": settings})
    np.testing.assert_array_equal(weight(found, "m"), INT4.weight)


def test_the_first_override_that_matches_wins_and_excluding_ones_come_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    wide = foreign.gptq(rng, bits=8, n=32, k=64, group=64)
    usual = foreign.gptq(rng, bits=4, n=32, k=64, group=32)
    dynamic = {r"+:.*\.mlp": {"bits": 8, "group_size": 64}, r".*\.0\.mlp": {"bits": 2}, r"-:.*attn\.o": {}}
    config = {"quantization_config": usual.settings | {"dynamic": dynamic}}
    found = opened(tmp_path / "folder", {"model.0.mlp.up": wide, "model.0.attn.q": usual}, config)
    np.testing.assert_array_equal(weight(found, "model.0.mlp.up"), wide.weight)
    np.testing.assert_array_equal(weight(found, "model.0.attn.q"), usual.weight)
    assert found.read("model.0.attn.o") is None


def groups(settings: dict[str, Any], **named: tuple[list[str], foreign.Foreign, str]) -> dict[str, Any]:
    """Settings of mixed precision: name -> (targets, who has such weights, format)."""
    table = {
        name: made.settings["config_groups"]["group_0"] | {"targets": targets, "format": form}
        for name, (targets, made, form) in named.items()
    }
    return {"quantization_config": settings | {"format": "mixed-precision", "config_groups": table}}


def test_each_module_has_the_format_of_its_most_specific_target(tmp_path: Path) -> None:
    config = groups(
        INT4.settings,
        a=(["Linear"], FP8, "float-quantized"),
        b=([r"re:.*mlp\..*"], INT4, "pack-quantized"),
        c=(["x.mlp.down"], FP8, "float-quantized"),
    )
    modules = {"x.attn.q": FP8, "x.mlp.up": INT4, "x.mlp.down": FP8}
    found = opened(tmp_path / "folder", modules, config)
    for module, made in modules.items():
        np.testing.assert_array_equal(weight(found, module), made.weight)


def test_a_group_without_a_format_has_the_one_of_its_tensors(tmp_path: Path) -> None:
    config = groups(INT4.settings, a=(["Linear"], FP8, ""), b=([r"re:.*mlp\..*"], INT4, ""))
    for group in config["quantization_config"]["config_groups"].values():
        del group["format"]
    found = opened(tmp_path / "folder", {"x.attn.q": FP8, "x.mlp.up": INT4}, config)
    np.testing.assert_array_equal(weight(found, "x.attn.q"), FP8.weight)
    np.testing.assert_array_equal(weight(found, "x.mlp.up"), INT4.weight)


def test_what_is_ignored_is_dense_and_tensors_that_say_otherwise_are_an_error(tmp_path: Path) -> None:
    config = {"quantization_config": INT4.settings | {"ignore": ["re:.*head", "x.q"]}}
    found = opened(tmp_path / "folder", {"x.q": INT4, "x.k": INT4}, config)
    assert found.read("head") is None
    with pytest.raises(CheckpointError, match=r"x\.q\.weight_packed': .* leaves x\.q out"):
        found.read("x.q")
    with pytest.raises(CheckpointError, match=r"x\.v\.weight_packed': missing; .*group_0 has x\.v in the format"):
        found.read("x.v")


ACTIVATIONS: dict[str, tuple[dict[str, Any], Activation | None]] = {
    "token": (dict(strategy="token", dynamic=True), Activation("e4m3", "token")),
    "static": (dict(strategy="tensor", dynamic=False), Activation("e4m3", "tensor", "static")),
    "block": (dict(strategy="group", group_size=128, dynamic=True), Activation("e4m3", "block")),
    "asymmetric": (dict(strategy="token", dynamic=True, symmetric=False), None),
    "group of 64": (dict(strategy="group", group_size=64, dynamic=True), None),
    "four bits": (dict(strategy="token", dynamic=True, num_bits=4), None),
}


@pytest.mark.parametrize(("given", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_are_quantized_as_the_group_says_or_a_note_says_that_they_are_not(
    given: dict[str, Any], expected: Activation | None, tmp_path: Path
) -> None:
    config = json.loads(json.dumps({"quantization_config": FP8.settings}))
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"type": "float", "num_bits": 8, "symmetric": True, **given}
    made = FP8._replace(tensors=FP8.tensors | {"input_scale": np.array([0.5], np.float32)})
    found = opened(tmp_path / "folder", {"m": made}, config)
    read = found.read("m")
    assert read is not None and read[0].scheme.activation == expected
    assert (expected is None) == any("input_activations" in note for note in found.notes)
    static = expected is not None and expected.mode == "static"
    assert (read[0].act_scale is not None) == static and (not static or float(read[0].act_scale) == 0.5)


@pytest.mark.parametrize("form", ["marlin-24", "sparse-bitmask", "sparse-24-bitmask", 5])
def test_formats_that_are_not_read_are_named_with_those_that_are(form: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"format={form!r}; expected one of {', '.join(WEIGHTS)}"):
        opened(tmp_path / "folder", {"m": INT4}, {"quantization_config": INT4.settings | {"format": form}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(quantization_status="frozen"), "quantization_status='frozen'; expected one of compressed"),
        (dict(transform_config={"config_groups": {"u": {}}}), "transform_config=.*rotated weights are not read"),
        (dict(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config=.*sparse weights are not read"),
        (dict(config_groups=None), "'config_groups' is missing"),
        (dict(ignore="lm_head"), "ignore='lm_head'; expected a list of strings"),
    ],
)
def test_settings_that_change_what_weights_mean_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "folder", {"m": INT4}, {"quantization_config": INT4.settings | settings})
