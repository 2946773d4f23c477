"""`qjax.save`: a model -> a folder that `qjax.load` reads: safetensors, config.json, and the tokenizer beside them."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qjax.checkpoints import compressed_tensors_write, gguf, gptq_write, native
from qjax.checkpoints.detect import KEYS
from qjax.checkpoints.files import CONFIG, read_json
from qjax.checkpoints.write import write_folder
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor, is_qtensor

if TYPE_CHECKING:  # imported when called, as in `qjax.checkpoints.load`
    from qjax.models.llama import Llama

type Arrays = Mapping[str, jax.Array | np.ndarray]

# Format -> a weight and its module's name as named arrays; weights and names of dense Linears as settings.
WRITERS: dict[str, tuple[Callable[[QTensor, str], Arrays], Callable[..., dict[str, Any]]]] = {
    "qjax": (lambda w, module: native.to_arrays(w, f"{module}.weight"), lambda weights, dense: native.config(weights)),
    "gptq": (gptq_write.to_arrays, gptq_write.config),
    "gptq_v2": (partial(gptq_write.to_arrays, version="gptq_v2"), partial(gptq_write.config, version="gptq_v2")),
    "compressed-tensors": (compressed_tensors_write.to_arrays, compressed_tensors_write.config),
}

# What goes along unchanged: what tells text from tokens, when to stop, and on which terms it may be used.
CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def save(
    model: "Llama",
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    format: str = "qjax",
    overwrite: bool = False,
) -> None:
    """Writes a model, quantized or not, as a folder.

    It is written aside and renamed, so that a write that fails leaves nothing behind and loses nothing.

    Args:
      model: a Llama; codes, scales and zero points are stored to the bit.
      path: the folder to make.
      source: the folder that the model was loaded from: its config.json is the new one's, but for the quantization, and
        its tokenizer, generation settings and licence are copied.
      format: "qjax" holds every QTensor (`qjax.checkpoints.native`); the others are for other tools: "gptq" (version
        1) and "gptq_v2" hold integer weights in groups of K, "compressed-tensors" also e4m3 weights, and x in 8 bits.
      overwrite: replace `path` if it is a checkpoint folder.

    Raises:
      CheckpointError: `path` exists; `source` has no config.json; `model` is no Llama; a weight that the format has no
        place for; an unknown format.
    """
    if format not in WRITERS:
        raise CheckpointError(f"format={format!r}; known: {', '.join(WRITERS)}")
    to_arrays, settings = WRITERS[format]
    tensors: dict[str, QTensor] = {}
    dense: list[str] = []
    arrays: dict[str, jax.Array | np.ndarray] = {}
    for module, name, value in _variables(model):
        if is_qtensor(value):
            # A table [vocabulary, features] is stored as the head's kernel, its transpose, is.
            tensors[module] = dataclasses.replace(value, axes=None) if name == "embedding" else value
            arrays |= to_arrays(value, module)
        elif name == "kernel":  # Flax has [in, out], files have [out, in]
            dense.append(module)
            arrays[f"{module}.weight"] = np.asarray(value).T
        else:
            arrays[f"{module}.{'weight' if name == 'embedding' else name}"] = value
    config, carried = _of_text_model(Path(source))
    if tensors:
        config["quantization_config"] = settings(tensors, dense)
    write_folder(path, tensors=arrays, config=config, extra_files=carried, overwrite=overwrite)


def _variables(model: Any) -> Iterator[tuple[str, str, Any]]:
    """(module's name in a file, attribute, value) of every Variable."""
    from flax import nnx

    from qjax.models.llama import Llama
    from qjax.models.merge import MergedLinear
    from qjax.models.tensor_names import TensorNames
    from qjax.nnx import QLoRALinear
    from qjax.nnx.delayed import DelayedScale

    if not isinstance(model, Llama):
        raise CheckpointError(f"save takes a qjax.models.Llama, whose tensors have names; got {type(model).__name__}")
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MergedLinear):
            where = ".".join(map(str, path))
            raise CheckpointError(f"{where}: is merged, and files hold its parts: save the model before `merge`")
        if isinstance(module, QLoRALinear):
            where = ".".join(map(str, path))
            raise CheckpointError(f"{where}: has an adapter, which files have no place for: qjax.nnx.merge_lora first")
        if isinstance(module, DelayedScale):
            where = ".".join(map(str, path[:-1]))
            raise CheckpointError(f"{where}: has a delayed scale of x: make it static by qjax.nnx.fix_scales first")
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Variable):
                yield TensorNames().prefix(".".join(map(str, path))), name, variable.get_value()


def beside(source: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config of a folder without its quantization, and the files that go along with it."""
    names = (file for file in sorted(source.iterdir()) if file.is_file())
    carried = {file.name: file.read_bytes() for file in names if any(fnmatch(file.name, p) for p in CARRIED)}
    return {key: value for key, value in config.items() if key not in KEYS}, carried


def _of_text_model(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The same of a folder's text model, or of a GGUF file."""
    from qjax.models.tensor_names import text_config

    if not source.is_dir() and source.suffix == gguf.SUFFIX:
        return gguf.open_file(source)[0].config, {}
    return beside(source, text_config(read_json(source / CONFIG)))
