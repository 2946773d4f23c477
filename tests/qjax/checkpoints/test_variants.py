"""What tools write differently for the same weights: names, files, types, settings. All load to the same model."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import foreign
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.write import write_folder
from qjax.errors import CheckpointError
from qjax.models import Llama

IDS = jnp.arange(24).reshape(2, 12) % 32

BASES: dict[str, Any] = {
    "gptq": (foreign.gptq, dict(bits=4, group=32)),
    "act-order": (foreign.gptq, dict(bits=4, group=32, index="random")),
    "awq": (foreign.awq, dict(group=32)),
    "packed": (foreign.ct_packed, dict(bits=4, group=32)),
    "asymmetric": (foreign.ct_packed, dict(bits=4, group=32, symmetric=False)),
    "packed act-order": (foreign.ct_packed, dict(bits=4, group=32, index="random")),
    "int8": (foreign.ct_int, dict(bits=8, strategy="channel")),
    "float": (foreign.ct_float, dict(strategy="tensor")),
    "channel": (foreign.ct_float, dict(strategy="channel")),
    "fp8": (foreign.fp8, dict(block=False)),
    "blocks": (foreign.fp8, dict()),
    "bnb": (foreign.bnb, dict()),
    "hqq": (foreign.hqq, dict(bits=4, group=32, axis=1)),
}


@dataclass
class Parts:
    """A folder to be changed: its tensors, its settings, its files."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    rename: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def group(self) -> dict[str, Any]:
        """The one config group of compressed-tensors."""
        found: dict[str, Any] = self.settings["config_groups"]["group_0"]
        return found

    def every(self, suffix: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
        """Changes each tensor whose name ends so; None drops it."""
        for name in [name for name in self.tensors if name.endswith(f".{suffix}")]:
            found = change(self.tensors.pop(name))
            if found is not None:
                self.tensors[name] = found

    def called(self, old: str, new: str) -> None:
        """Renames the beginnings of tensors."""
        self.tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: a for name, a in self.tensors.items()
        }

    def set(self, **values: Any) -> None:
        self.settings.update(values)

    def moved(self, name: str, **renamed: str) -> None:
        """Puts the settings into a file of their own, some keys under other names; None in `renamed` drops one."""
        settings = self.config.pop("quantization_config")
        self.extra[name] = {renamed.get(key, key): value for key, value in settings.items()}

    def without(self, *keys: str) -> None:
        for key in keys:
            self.settings.pop(key, None)


def bias(parts: Parts) -> None:
    for name, (n, _) in foreign.LINEARS.items():
        parts.tensors[f"model.layers.0.{name}.bias"] = np.zeros(n, np.float16)


def head(parts: Parts) -> None:
    """The embedding again, as a head."""
    parts.tensors["lm_head.weight"] = parts.tensors["model.embed_tokens.weight"]


def untied(parts: Parts) -> None:
    head(parts)
    parts.config["tie_word_embeddings"] = False


def seeing(root: str, tower: str) -> Callable[[Parts], None]:
    """A model that also sees, its text part under `root`."""

    def change(parts: Parts) -> None:
        parts.called("model.", root)
        parts.tensors[f"{tower}vision_tower.encoder.layers.0.fc1.weight"] = np.ones((4, 4), np.float16)
        parts.tensors[f"{tower}multi_modal_projector.linear.weight"] = np.ones((4, 4), np.float16)
        settings = parts.config.pop("quantization_config")
        text = parts.config
        tied = text.pop("tie_word_embeddings")
        parts.config = {"model_type": "llava", "text_config": text, "vision_config": {}, "tie_word_embeddings": tied}
        parts.config["quantization_config"] = settings

    return change


def cache_scales(*names: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name in names:
            parts.tensors[f"model.layers.0.self_attn.{name}"] = np.ones(1, np.float32)

    return change


def narrow(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.astype(dtype)


def autofp8(parts: Parts) -> None:
    """AutoFP8's names."""
    for name in [name for name in parts.tensors if name.endswith(".weight_scale_inv")]:
        parts.tensors[name.removesuffix("_inv")] = parts.tensors.pop(name)


# What is changed -> (base, change). The model stays the same.
VARIANTS: dict[str, tuple[str, Callable[[Parts], Any]]] = {
    "bits as a string": ("gptq", lambda p: p.set(bits="4", group_size="32")),
    "no sym": ("gptq", lambda p: p.without("sym")),
    "no checkpoint_format": ("gptq", lambda p: p.without("checkpoint_format")),
    "older names of keys": ("gptq", lambda p: (p.set(w_bit=4, q_group_size=32), p.without("bits", "group_size"))),
    "desc_act with an index in order": ("gptq", lambda p: p.set(desc_act=True)),
    "desc_act, static groups": ("act-order", lambda p: p.set(desc_act=True, static_groups=True)),
    "desc_act=false beside an index in another order": ("act-order", lambda p: p.set(desc_act=False)),
    "an index of zeros": ("gptq", lambda p: p.every("g_idx", np.zeros_like)),
    "no index": ("gptq", lambda p: p.every("g_idx", lambda a: None)),
    "an index of int64": ("act-order", lambda p: p.every("g_idx", narrow(np.int64))),
    "words of uint32": ("gptq", lambda p: p.every("qweight", lambda a: a.view(np.uint32))),
    "scales of float32": ("gptq", lambda p: p.every("scales", narrow(np.float32))),
    "biases of zeros": ("gptq", bias),
    "quantize_config.json": ("gptq", lambda p: p.moved("quantize_config.json")),
    "quantize_config.json, no method": ("gptq", lambda p: (p.without("quant_method"), p.moved("quantize_config.json"))),
    "GPTQModel's names": ("gptq", lambda p: p.moved("quantize_config.json", quant_method="method")),
    "settings in both places": (
        "gptq",
        lambda p: p.extra.update({"quantize_config.json": {"bits": 2, "quant_method": "gptq"}}),
    ),
    "what GPTQModel remembers": (
        "gptq",
        lambda p: p.set(
            damp_percent=0.05,
            true_sequential=True,
            static_groups=False,
            pack_dtype="int32",
            adapter=None,
            meta={"quantizer": ["gptqmodel:5.0"]},
            lm_head=False,
            model_file_base_name=None,
            dynamic=None,
            is_marlin_format=False,
            desc_act=False,
            modules_in_block_to_quantize=None,
        ),
    ),  # fmt: skip
    "AutoGPTQ's file name": ("gptq", lambda p: p.rename.update({"model.": "gptq_model-4bit-32g."})),
    "an index of another name": (
        "gptq",
        lambda p: (setattr(p, "shards", 2), p.rename.update({"model.safetensors.index": "gptq.safetensors.index"})),
    ),
    "two shards": ("gptq", lambda p: setattr(p, "shards", 2)),
    "a head beside a tied embedding": ("gptq", head),
    "a head of its own": ("gptq", untied),
    "frequencies that are computed": (
        "gptq",
        lambda p: p.tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}),
    ),
    "names without model.": ("gptq", lambda p: p.called("model.", "")),
    "a model that sees, older names": ("gptq", seeing("language_model.model.", "")),
    "a model that sees, newer names": ("packed", seeing("model.language_model.", "model.")),
    "AutoAWQ's quant_config.json": (
        "awq",
        lambda p: (
            p.without("quant_method"),
            p.moved("quant_config.json", bits="w_bit", group_size="q_group_size"),
        ),
    ),
    "AWQ's layout in capitals": ("awq", lambda p: p.set(version="GEMM", modules_to_not_convert=["lm_head"])),
    "AWQ as IPEX says it": ("awq", lambda p: p.set(version="ipex")),
    "AWQ as GPTQModel says it": ("awq", lambda p: (p.without("version"), p.set(checkpoint_format="gemm"))),
    "AWQ as others fuse it": (
        "awq",
        lambda p: p.set(do_fuse=True, fuse_max_seq_len=512, exllama_config={"version": 2}),
    ),
    "AWQ words of uint32": ("awq", lambda p: p.every("qzeros", lambda a: a.view(np.uint32))),
    "targets by pattern": ("packed", lambda p: p.group.update(targets=[r"re:.*(q|k|v|o)_proj$", r"re:.*mlp\..*"])),
    "targets by name": (
        "packed",
        lambda p: p.group.update(targets=[f"model.layers.0.{name}" for name in foreign.LINEARS]),
    ),
    "what is ignored, by pattern": ("packed", lambda p: p.set(ignore=["re:.*lm_head", "re:^(?!model).*$", "lm_head"])),
    "actorder=weight": ("packed", lambda p: p.group["weights"].update(actorder="weight")),
    "actorder=static": ("packed", lambda p: p.group["weights"].update(actorder="static")),
    "actorder=null": ("packed", lambda p: p.group["weights"].update(actorder=None, observer="minmax", dynamic=False)),
    "actorder=group": ("packed act-order", lambda p: p.group["weights"].update(actorder="group")),
    "an index that was never set": (
        "packed",
        lambda p: [
            p.tensors.update({f"model.layers.0.{name}.weight_g_idx": np.full(k, -1, np.int32)})
            for name, (_, k) in foreign.LINEARS.items()
        ],
    ),
    "group_size as a string": ("packed", lambda p: p.group["weights"].update(group_size="32", num_bits="4")),
    "no strategy": ("packed", lambda p: p.group["weights"].pop("strategy")),
    "no format anywhere": ("packed", lambda p: (p.without("format"), p.group.pop("format", None))),
    "older key of the settings": (
        "packed",
        lambda p: p.config.update(compression_config=p.config.pop("quantization_config")),
    ),
    "what llm-compressor remembers": (
        "asymmetric",
        lambda p: p.set(
            quantization_status="compressed",
            global_compression_ratio=None,
            sparsity_config={},
            transform_config={},
            kv_cache_scheme=None,
            version="0.11.0",
        ),
    ),  # fmt: skip
    "scales of rows in one axis": ("channel", lambda p: p.every("weight_scale", lambda a: a.reshape(-1))),
    "a scale without axes": ("float", lambda p: p.every("weight_scale", lambda a: a.reshape(()))),
    "weight_shape of int32": ("packed", lambda p: p.every("weight_shape", narrow(np.int32))),
    "scales of a KV cache": ("packed", cache_scales("k_scale", "v_scale", "q_scale")),
    "scales of a KV cache, as vLLM has them": ("blocks", cache_scales("attn.k_scale", "attn.v_scale")),
    "scales of a KV cache, as of a projection": ("packed", cache_scales("k_proj.output_scale", "v_proj.output_scale")),
    "scales of a KV cache, AutoFP8": ("fp8", cache_scales("k_proj.k_scale", "v_proj.v_scale", "kv_scale")),
    "AutoFP8's names": ("fp8", autofp8),
    "what FP8 folders leave out": (
        "blocks",
        lambda p: p.set(fmt="e4m3", modules_to_not_convert=["lm_head"], ignored_layers=None, scale_fmt="float"),
    ),
    "bitsandbytes before it was named": ("bnb", lambda p: (p.without("quant_method"), p.set(load_in_4bit=True))),
    "what bitsandbytes remembers": (
        "bnb",
        lambda p: p.set(
            _load_in_4bit=True,
            _load_in_8bit=False,
            llm_int8_has_fp16_weight=False,
            llm_int8_skip_modules=None,
            llm_int8_threshold=6.0,
            bnb_4bit_quant_storage="uint8",
            bnb_4bit_use_double_quant=False,
        ),
    ),  # fmt: skip
    "HQQ's settings of layers": (
        "hqq",
        lambda p: p.set(quant_config={"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}}),
    ),
}


def write(folder: Path, parts: Parts) -> Path:
    size = sum(array.nbytes for array in parts.tensors.values())
    write_folder(folder, tensors=parts.tensors, config=parts.config, shard_bytes=size // parts.shards + 4096)
    for name, value in parts.extra.items():
        (folder / name).write_text(json.dumps(value))
    for old, new in parts.rename.items():
        for file in [file for file in folder.iterdir() if file.name.startswith(old)]:
            file.rename(folder / file.name.replace(old, new))
    return folder


def parts_of(folder: Path) -> Parts:
    files = CheckpointFiles.open(folder)
    return Parts({name: np.array(files[name]) for name in files}, json.loads(json.dumps(files.config)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """Gives a folder of a base and its logits."""
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def find(base: str) -> tuple[Path, np.ndarray]:
        if base not in made:
            folder = foreign.llama(tmp_path_factory.mktemp("plain") / "model", *BASES[base])
            made[base] = (folder, np.asarray(logits(qjax.load(folder, activations="none"))))
        return made[base]

    return find


@nnx.jit
def logits(model: Llama) -> jax.Array:
    return model(IDS)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_tools_write_differently_is_the_same_model(
    name: str, plain: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    base, change = VARIANTS[name]
    folder, expected = plain(base)
    parts = parts_of(folder)
    change(parts)
    model = qjax.load(write(tmp_path / "model", parts), activations="none")
    np.testing.assert_allclose(logits(model), expected, atol=1e-5 * np.abs(expected).max())
    if "KV cache" in name:
        assert "scales of a KV cache" in str(qjax.explain(model))
    if "sees" in name:
        assert "2 tensors of" in str(qjax.explain(model))


def test_activations_that_are_not_quantized_as_asked_are_noted(
    plain: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    parts = parts_of(plain("packed")[0])
    asked = dict(num_bits=8, type="int", strategy="tensor", dynamic=False)
    parts.group.update(input_activations=asked | {"symmetric": False}, output_activations=asked)
    told = str(qjax.explain(qjax.load(write(tmp_path / "model", parts))))
    assert "group_0: input_activations (num_bits=8, type=int, strategy=tensor, dynamic=False, symmetric=False)" in told
    assert "group_0: output_activations are left as they are" in told


# What cannot be read for sure -> (base, change, what the error says).
REFUSED: dict[str, tuple[str, Callable[[Parts], Any], str]] = {
    "act-order whose index is lost": (
        "act-order",
        lambda p: (p.set(desc_act=True), p.every("g_idx", lambda a: None)),
        r"proj\.g_idx': missing; .*desc_act=true",
    ),
    "actorder=group whose index is lost": (
        "packed",
        lambda p: p.group["weights"].update(actorder="group"),
        r"weight_g_idx': missing; .*actorder='group'",
    ),
    "bits as words": ("gptq", lambda p: p.set(bits="four"), r"bits='four'; expected one of 2, 3, 4, 8"),
    "two files and no index": (
        "gptq",
        lambda p: (setattr(p, "shards", 2), p.rename.update({"model.safetensors.index": "lost"})),
        r"no model\.safetensors",
    ),
    "marlin's layout": ("gptq", lambda p: p.set(checkpoint_format="marlin"), "checkpoint_format='marlin'; expected"),
    "AWQ of another layout, as GPTQModel says it": (
        "awq",
        lambda p: (p.without("version"), p.set(checkpoint_format="gemv_fast")),
        "checkpoint_format='gemv_fast'; expected one of gemm",
    ),
    "vision tensors in a model that does not see": (
        "gptq",
        lambda p: p.tensors.update({"vision_tower.fc1.weight": np.ones((4, 4), np.float16)}),
        r"belong to no part of a llama.*vision_tower\.fc1\.weight",
    ),
    "a scale of a KV cache that is no number": (
        "packed",
        lambda p: p.tensors.update({"model.layers.0.self_attn.k_scale": np.full(1, np.nan, ml_dtypes.bfloat16)}),
        r"k_scale': 1 of 1 values are NaN",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_for_sure_is_refused(
    name: str, plain: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    base, change, message = REFUSED[name]
    parts = parts_of(plain(base)[0])
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        qjax.load(write(tmp_path / "model", parts))
