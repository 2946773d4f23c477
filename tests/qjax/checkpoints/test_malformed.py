"""What is wrong with a quantized folder is said with file, tensor or key, what was found and what is allowed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax.errors import CheckpointError, QJaxError

SMALL = Path(__file__).parents[2] / "data" / "checkpoints"
Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"

type Tensors = dict[str, np.ndarray]


def settings(**changes: Any) -> Callable[[dict[str, Any], Tensors], None]:
    """Changes keys of the quantization_config; None takes one away."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        given = config["quantization_config"] | changes
        config["quantization_config"] = {key: value for key, value in given.items() if value is not None}

    return change


def tensor(name: str, make: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[dict[str, Any], Tensors], None]:
    """Changes a tensor; None takes it away."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        old = tensors.pop(name)
        if make is not None:
            tensors[name] = np.ascontiguousarray(make(old.copy()))

    return change


def put(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Sets elements of an array."""

    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def state(**changes: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Changes keys of a bitsandbytes quant_state."""
    return lambda raw: np.frombuffer(json.dumps(json.loads(raw.tobytes()) | changes).encode(), np.uint8)


GPTQ: dict[str, tuple[Any, str]] = {
    "no method": (settings(quant_method=None), "key 'quant_method' is missing; expected one of .*gptq.*awq"),
    "unknown method": (settings(quant_method="frobnicate"), "quant_method='frobnicate'; expected one of .*gptq"),
    "method of another type": (settings(quant_method=["gptq"]), r"quant_method=\['gptq'\]"),
    "kernel's own format": (settings(checkpoint_format="marlin"), "checkpoint_format='marlin'; expected .* gptq_v2"),
    "old marlin flag": (settings(is_marlin_format=True), "is_marlin_format=True"),
    "packed in int64": (settings(pack_dtype="int64"), "pack_dtype='int64'; expected one of int32"),
    "five bits": (settings(bits=5), "bits=5; expected one of 2, 3, 4, 8"),
    "bits of another type": (settings(bits=True), "bits=True; expected one of"),
    "no bits": (settings(bits=None), "key 'bits' is missing"),
    "other bits than the file": (settings(bits=8), r"down_proj.qweight': shape \[16, 256\]; expected \[32, 256\]"),
    "group of zero": (settings(group_size=0), "group_size=0; expected -1 .* or a positive integer"),
    "another group": (
        settings(group_size=64),
        r"scales': shape \[1, 256\]; expected \[2, 256\] .*would be of 128",
    ),
    "override that is no pattern": (settings(dynamic={"(": {"bits": 8}}), r"dynamic: '\(' is no regular expression"),
    "override with five bits": (settings(dynamic={".*": {"bits": 5}}), r"dynamic\['\.\*'\]: bits=5"),
    "override that excludes": (settings(dynamic={"-:.*q_proj": {}}), f"{Q}.qweight': .*leaves {Q} out"),
    "scales missing": (tensor(f"{Q}.scales", None), f"'{Q}.scales' is missing"),
    "zero points missing": (tensor(f"{Q}.qzeros", None), f"'{Q}.qzeros' is missing"),
    "codes missing": (tensor(f"{Q}.qweight", None), f"unexpected {Q}.g_idx, {Q}.qzeros, {Q}.scales"),
    "NaN": (tensor(f"{Q}.scales", put((0, 3), np.nan)), f"{Q}.scales': 1 of 512 values are NaN or infinite"),
    "infinity": (tensor(f"{Q}.scales", put((0, slice(3)), np.inf)), f"{Q}.scales': 3 of 512 values"),
    "group out of range": (tensor(f"{Q}.g_idx", put(17, 9)), r"g_idx': value 9 at \[17\]; allowed are 0 to 1"),
    "negative group": (tensor(f"{Q}.g_idx", put(5, -3)), r"g_idx': value -3 at \[5\]"),
    "transposed": (tensor(f"{Q}.qweight", lambda a: a.reshape(256, 32)), r"\[256, 32\]; expected \[32, 256\]"),
    "one axis": (tensor(f"{Q}.qweight", lambda a: a.reshape(-1)), r"shape \[8192\]; expected \[K \* 4 / 32, N\]"),
    "float codes": (tensor(f"{Q}.qweight", lambda a: a.view(np.float32)), "dtype float32; expected int32 or uint32"),
    "a strange tensor": (lambda _, t: t.update({f"{Q}.x": np.zeros(1)}), f"unexpected {Q}.x"),
    "a dense weight too": (lambda _, t: t.update({f"{Q}.weight": np.zeros((256, 256))}), f"unexpected {Q}.weight"),
    "settings that are a list": (lambda c, _: c.update(quantization_config=[1]), "is list; expected an object"),
}

BNB: dict[str, tuple[Any, str]] = {
    "state is no JSON": (tensor(STATE, lambda raw: raw[:40]), f"{STATE}': not valid JSON"),
    "state is a list": (tensor(STATE, lambda raw: np.frombuffer(b"[]", np.uint8)), f"{STATE}': list; expected a JSON"),
    "blocks of zero": (tensor(STATE, state(blocksize=0)), f"{STATE}': blocksize=0; expected a positive integer"),
    "huge shape": (tensor(STATE, state(shape=[2**40, 256])), r"weight': 32768 bytes; .* says \[1099511627776, 256\]"),
    "shape of one": (tensor(STATE, state(shape=[5])), r"shape=\[5\]; expected two positive integers"),
    "another type": (tensor(STATE, state(quant_type="fp4")), "quant_type='fp4'; expected one of nf4"),
    "absmax missing": (tensor(f"{Q}.weight.absmax", None), f"'{Q}.weight.absmax' is missing"),
    "absmax too short": (tensor(f"{Q}.weight.absmax", lambda a: a[:-1]), r"shape \[1023\]; expected \[1024\]"),
    "absmax NaN": (tensor(f"{Q}.weight.absmax", put(0, np.nan)), f"{Q}.weight.absmax': 1 of 1024 values"),
    "a short table": (tensor(f"{Q}.weight.quant_map", lambda a: a[:8]), r"quant_map': shape \[8\]; expected \[16\]"),
    "state missing": (tensor(STATE, None), f"unexpected .*{Q}.weight.absmax"),
}


def damaged(name: str, change: Any, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(SMALL / name, tmp_path / "folder"))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("change", "message"), GPTQ.values(), ids=GPTQ)
def test_a_damaged_gptq_folder_is_refused_with_the_reason(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        qjax.load(damaged("gptq-4b-g128", change, tmp_path))


@pytest.mark.parametrize(("change", "message"), BNB.values(), ids=BNB)
def test_a_damaged_bitsandbytes_folder_is_refused_with_the_reason(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        qjax.load(damaged("bnb-nf4", change, tmp_path))


# What each of a set of damaged folders should be refused with; the others in it are right.
SAID = {
    "truncated": r"model\.safetensors: .*the header describes \d+ bytes, the file has 193600",
    "header-length-lie": r"model\.safetensors: header length 1099511627776",
    "header-not-json": r"model\.safetensors: the header is not valid JSON",
    "offsets-outside": "tensor 'model.norm.weight'",
    "index-outside": r"'\.\./good/model\.safetensors'",
    "missing-scales": r"k_proj\.scales",
    "g-idx-out-of-range": r"g_idx': value 9 at \[17\]",
    "wrong-group-size": "in groups of 64; 1 groups would be of 128",
    "wrong-bits": r"\[16, 256\]; expected \[32, 256\] at 8 bits",
    "nan-scale": r"v_proj\.scales': 1 of 256",
    "unknown-quant-method": "'frobnicate'; expected one of .*gptq",
    "unsupported-checkpoint-format": "'marlin'; expected one of gptq, gptq_v2",
    "no-quant-method": "'quant_method' is missing",
    "wrong-shape": r"o_proj\.qweight': shape \[256, 32\]; expected \[32, 256\]",
    "pickle-bin": "only pickle files .*safetensors",
    "config-not-json": r"config\.json: not valid JSON at line 1, column 25",
    "empty-folder": r"the folder is empty; expected config\.json",
    "ct-weight-shape-lie": r"weight_shape': says \[1099511627776, 256\], and weight_packed has shape \[256, 32\]",
    "ct-marlin-24": "format='marlin-24'; expected one of pack-quantized",
    "bnb-quant-state-not-json": r"q_proj\.weight\.quant_state\.bitsandbytes__nf4': not valid JSON",
    "bnb-blocksize-zero": "blocksize=0",
    "bnb-missing-absmax": r"q_proj\.weight\.absmax' is missing",
    "bits-five": "bits=5; expected one of 2, 3, 4, 8",
    "group-size-zero": "group_size=0; expected -1",
}


@pytest.mark.parametrize("name", SAID)
def test_a_folder_of_the_malformed_set_is_refused(name: str, real_folder: Callable[[str], Path]) -> None:
    with pytest.raises(QJaxError, match=SAID[name]):
        qjax.load(real_folder("malformed") / name)


@pytest.mark.parametrize("name", ["good", "good-ct", "good-bnb"])
def test_a_right_folder_of_the_malformed_set_loads(name: str, real_folder: Callable[[str], Path]) -> None:
    qjax.load(real_folder("malformed") / name)
