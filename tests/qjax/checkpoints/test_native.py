"""Every QTensor comes back from a folder to the bit; a record or an array that is not right is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoints import CheckpointFiles, native, write_folder
from qjax.checkpoints.detect import source
from qjax.checkpoints.load import checked, on_device
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor, concat_rows

SPECS = [
    *("w8a16", "w6a16", "w5a16:symmetric=false", "w4a16:group_size=32", "w3a16", "w2a16"),
    *("w4a16:symmetric=false,scale_dtype=bfloat16", "fp8:format=e5m2", "fp8:granularity=block", "w8a8_fp8"),
    *("nf4", "nf4:double_quant=true", "fp4", "mxfp4", "mxfp8", "nvfp4", "w8a8_int8:activation=tensor"),
]


def weight(scheme: str, *shape: int) -> QTensor:
    kernel = jax.random.normal(jax.random.key(0), shape or (256, 96), jnp.bfloat16)
    return qjax.quantize_array(kernel, scheme)


def with_every_field() -> QTensor:
    w = weight("w4a16:group_size=32", 2, 128, 48)
    return dataclasses.replace(
        w,
        zero_point=jnp.full(w.scale.shape, 7.5, jnp.float32),
        global_scale=jnp.array([0.5, 2.0], jnp.float32),
        codebook=jnp.tile(jnp.linspace(-1, 1, 16, dtype=jnp.float32), (2, 1)),
        offset=jnp.array([0.25, -0.25], jnp.float32),
        input_perm=jnp.stack([jnp.arange(128)[::-1], jnp.arange(128)]).astype(jnp.int32),
        input_scale=jnp.full((2, 128), 3, jnp.float16),
        act_scale=jnp.ones((2,), jnp.float32),
        in_shape=(4, 32),
        out_shape=(6, 8),
        axes=(0, 2, 1, 3),
    )


def write(path: Path, tensors: dict[str, QTensor]) -> Path:
    arrays: dict[str, Any] = {}
    for module, w in tensors.items():
        arrays |= native.to_arrays(w, f"{module}.weight")
    write_folder(path, tensors=arrays, config={"quantization_config": native.config(tensors)}, overwrite=True)
    return path


def read(path: Path, module: str) -> QTensor:
    opened = source(CheckpointFiles.open(path))
    assert opened is not None
    found = opened.read(module)
    assert found is not None
    w, names = found
    assert set(names) == set(native.to_arrays(w, f"{module}.weight"))
    return on_device(checked(w, module))


def assert_same(got: QTensor, expected: QTensor) -> None:
    # Equal treedefs: scheme, dtype, k_piece, shapes and which fields there are, of nested scales too.
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_comes_back_to_the_bit(spec: str, tmp_path: Path) -> None:
    w = weight(spec)
    got = read(write(tmp_path, {"layers.0.proj": w}), "layers.0.proj")
    assert_same(got, w)
    chex.assert_trees_all_equal(got.dequantize(), w.dequantize())


def test_every_optional_field_and_the_flax_axes_come_back(tmp_path: Path) -> None:
    w = with_every_field()
    got = read(write(tmp_path, {"w": w}), "w")
    assert_same(got, w)
    assert got.shape == (2, 4, 6, 32, 8)


def test_merged_rows_and_pieces_made_for_shards_come_back(tmp_path: Path) -> None:
    kernel = jax.random.normal(jax.random.key(1), (192, 32))
    pieces = qjax.quantize_array(kernel, "w4a16:group_size=32", k_pieces=2)
    merged = concat_rows([weight("nvfp4"), weight("nvfp4")])
    folder = write(tmp_path, {"pieces": pieces, "merged": merged})
    assert_same(read(folder, "pieces"), pieces)
    assert_same(read(folder, "merged"), merged)


def test_a_module_that_is_not_listed_is_not_quantized(tmp_path: Path) -> None:
    opened = source(CheckpointFiles.open(write(tmp_path, {"a": weight("nf4")})))
    assert opened is not None and opened.read("b") is None


def test_a_folder_weighs_what_its_tensors_say(tmp_path: Path) -> None:
    w = weight("w4a16")
    write(tmp_path, {"a": w})
    header = 8 + 1024
    assert w.nbytes <= (tmp_path / "model.safetensors").stat().st_size <= w.nbytes + header


RECORDS: list[tuple[str, Any, str]] = [
    ("a", None, "no record of a tensor"),
    ("a.more", 1, "no record of a tensor"),
    ("a.dtype", "float8", "dtype='float8'; allowed"),
    ("a.k_piece", [128], "expected two integers"),
    ("a.k_piece", [0, 128], "k_piece.*at least 1"),
    ("a.k_piece", [128, 256], r"k_piece=\(128, 256\) does not fit"),
    ("a.in_shape", [3, 5], "do not multiply to K=256"),
    ("a.arrays", ["packed"], "arrays=.*expected packed, scale"),
    ("a.arrays", ["packed", "scale", "colour"], "arrays="),
    ("a.arrays", ["packed", "scale", "zero_point"], "'a.weight.zero_point' is missing"),
    ("a.scheme", "w4a16", "not a stored scheme"),
    ("a.scheme.weight", "int9", "not a stored scheme"),
    ("a.scheme.weight", "int3", "packed has shape"),
    ("a.scheme.block", [1, "64"], "not a scheme"),
    ("a.scheme.block", [1, 64], r"scale has shape .* ask for \(96, 4\)"),
    ("a.scheme.symmetric", "yes", "not a scheme"),
    ("a.scheme.spec", ["w4a16"], "not a scheme"),
    ("a.scheme.activation", {"format": "int9", "granularity": "token", "mode": "dynamic"}, "not a scheme"),
    ("a.scheme.activation", {"format": "int8", "granularity": "tensor", "mode": "static"}, "no a.act_scale"),
]


@pytest.mark.parametrize(("key", "value", "message"), RECORDS, ids=lambda v: str(v)[:40])
def test_a_malformed_record_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"a": weight("w4a16")})
    config = json.loads((tmp_path / "config.json").read_text())
    *above, last = key.split(".")
    place = config["quantization_config"]["tensors"]
    for name in above:
        place = place[name]
    place[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, "a")
    assert "a" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2; this QJAX reads 1"),
        ({"tensors": [1]}, "tensors is list; expected an object"),
        ({"tensors": {"b": {}}}, "b is listed, and the folder has no b.weight.packed"),
    ],
    ids=str,
)
def test_a_malformed_quantization_config_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, {"a": weight("w4a16")})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        source(CheckpointFiles.open(tmp_path))


@pytest.mark.parametrize(
    ("spec", "field", "bad"),
    [
        ("w4a16", "scale", np.nan),
        ("w4a16", "scale", np.inf),
        ("fp8", "packed", np.nan),
        ("mxfp4", "scale", np.nan),
        ("nvfp4", "global_scale", np.nan),
    ],
)
def test_values_that_are_not_finite_are_counted_and_named(spec: str, field: str, bad: float) -> None:
    w = jax.tree.map(np.array, weight(spec))
    values = getattr(w, field)
    values.reshape(-1)[: min(3, values.size)] = bad
    count = min(3, values.size)
    with pytest.raises(CheckpointError, match=rf"^up_proj\.{field}: {count} of {values.size} values are NaN or inf"):
        checked(w, "up_proj")


def test_a_nan_in_double_quantized_scales_is_named_by_its_level() -> None:
    w = jax.tree.map(np.array, weight("nf4:double_quant=true"))
    w.scale.scale[0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"^up_proj\.scale\.scale: 1 of"):
        checked(w, "up_proj")


def test_an_input_order_that_repeats_a_column_is_refused() -> None:
    w = dataclasses.replace(weight("w4a16"), input_perm=np.zeros(256, np.int32))
    with pytest.raises(CheckpointError, match="input_perm is no permutation of 0 to 255"):
        checked(w, "up_proj")
