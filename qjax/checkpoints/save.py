"""`qjax.save`: a model -> a folder that `qjax.load` reads: safetensors, config.json, and the tokenizer beside them."""

import dataclasses
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qjax.checkpoints import native
from qjax.checkpoints.files import CONFIG, read_json
from qjax.checkpoints.write import write_folder
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor, is_qtensor

if TYPE_CHECKING:  # imported when called, as in `qjax.checkpoints.load`
    from qjax.models.llama import Llama

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
    overwrite: bool = False,
) -> None:
    """Writes a model, quantized or not, as a folder.

    It is written aside and renamed, so that a write that fails leaves nothing behind and loses nothing.

    Args:
      model: a Llama; a QTensor is stored to the bit, by the format in `qjax.checkpoints.native`.
      path: the folder to make.
      source: the folder that the model was loaded from: its config.json is the new one's, but for the quantization, and
        its tokenizer, generation settings and licence are copied.
      overwrite: replace `path` if it is a checkpoint folder.

    Raises:
      CheckpointError: `path` exists; `source` has no config.json; `model` is no Llama.
    """
    tensors: dict[str, QTensor] = {}
    arrays: dict[str, jax.Array | np.ndarray] = {}
    for module, name, value in _variables(model):
        if is_qtensor(value):
            # A table [vocabulary, features] is stored as the head's kernel, its transpose, is.
            tensors[module] = dataclasses.replace(value, axes=None) if name == "embedding" else value
            arrays |= native.to_arrays(value, f"{module}.weight")
        elif name == "kernel":  # Flax has [in, out], files have [out, in]
            arrays[f"{module}.weight"] = np.asarray(value).T
        else:
            arrays[f"{module}.{'weight' if name == 'embedding' else name}"] = value
    config = read_json(Path(source) / CONFIG)
    config.pop("quantization_config", None)
    if tensors:
        config["quantization_config"] = native.config(tensors)
    write_folder(path, tensors=arrays, config=config, extra_files=_carried(Path(source)), overwrite=overwrite)


def _variables(model: Any) -> Iterator[tuple[str, str, Any]]:
    """(module's name in a file, attribute, value) of every Variable."""
    from flax import nnx

    from qjax.models.llama import Llama
    from qjax.models.llama_weights import tensor_prefix

    if not isinstance(model, Llama):
        raise CheckpointError(f"save takes a qjax.models.Llama, whose tensors have names; got {type(model).__name__}")
    for path, module in nnx.iter_modules(model):
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Variable):
                yield tensor_prefix(".".join(map(str, path))), name, variable.get_value()


def _carried(source: Path) -> dict[str, bytes]:
    names = (file for file in sorted(source.iterdir()) if file.is_file())
    return {file.name: file.read_bytes() for file in names if any(fnmatch(file.name, p) for p in CARRIED)}
