"""Which format a folder is in: its `quantization_config`, or the file that older tools wrote beside config.json."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qjax.checkpoints import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, hqq, mxfp4, native
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source
from qjax.errors import CheckpointError

# quant_method of config.json -> what reads a folder in that format.
READERS: dict[str, Callable[[CheckpointFiles, Settings], Source]] = {
    native.METHOD: lambda files, settings: Source(native.reader(files, settings), native.MARKS, ours=True),
    "gptq": gptq.reader,
    "awq": awq.reader,
    "compressed-tensors": compressed_tensors.reader,
    "fp8": fp8.reader,
    "bitsandbytes": bitsandbytes.reader,
    "mxfp4": mxfp4.reader,
    "hqq": hqq.reader,
}

UNNAMED = ("load_in_4bit", "load_in_8bit")  # keys of bitsandbytes' settings before they were named

# Settings of other libraries' kernels and loaders, in any format: what is done instead.
HINTS = {
    "backend": "kernels are chosen by qjax.explain",
    "use_exllama": "kernels are chosen by qjax.explain",
    "exllama_config": "kernels are chosen by qjax.explain",
    "max_input_length": "inputs have any length",
    "tune_metadata": "tuned for a kernel that is not used",
    "do_fuse": "products are fused by qjax.explain's kernels",
    "bnb_4bit_compute_dtype": "activations are in the dtype of qjax.load",
}

# Scales of a KV cache, beside the projections or (as those of what a projection gives) in one.
CACHE_SCALES = (
    r".*\.self_attn\.(?:(?:attn\.|[kv]_proj\.)?(?:q|k|v|kv)_(?:scale|zero_point)"
    r"|[kv]_proj\.output_(?:scale|zero_point))"
)
AS_ACTIVATIONS = "keys and values are cached in the dtype of activations"

# Keys of config.json that hold the settings, and the quant_method where they do not say it.
KEYS = {"quantization_config": None, "compression_config": "compressed-tensors"}

# Files beside config.json that hold the settings where config.json has none, and the quant_method that they imply.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def opened(path: Path) -> tuple[CheckpointFiles, Source | None]:
    """A folder or a GGUF file, and what reads its quantized weights. Errors as `CheckpointFiles.open` and `source`."""
    if path.suffix == gguf.SUFFIX and not path.is_dir():
        return gguf.open_file(path)
    files = CheckpointFiles.open(path)
    return files, source(files)


def source(files: CheckpointFiles) -> Source | None:
    """The opened folder; None where it is dense.

    Raises:
      CheckpointError: settings that are no object; a format that is not known here, naming those that are; and whatever
        the format's reader finds wrong.
    """
    settings = _settings(files)
    if settings is None:
        return None
    method = settings.get("quant_method")
    if method is None and any(key in settings for key in UNNAMED):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in READERS:
        raise settings.error("quant_method", f"one of {', '.join(READERS)}")
    found = READERS[method](files, settings)
    hints = tuple(f"{key}={settings.get(key)!r}: {instead}" for key, instead in HINTS.items() if key in settings)
    cache = tuple(_cache_notes(files, settings))
    return dataclasses.replace(
        found, beside=(*found.beside, CACHE_SCALES), notes=(*found.notes, *hints, *dict.fromkeys(cache))
    )


def _cache_notes(files: CheckpointFiles, settings: Settings) -> Iterator[str]:
    """What is said of a KV cache, after a look at its scales."""
    if settings.part("kv_cache_scheme") is not None:
        yield f"kv_cache_scheme: {AS_ACTIVATIONS}"
    names = [name for name in files if re.fullmatch(CACHE_SCALES, name)]
    for name in names:
        module, _, suffix = name.rpartition(".")
        ModuleTensors(files, module).take(suffix, (*SCALES, "int8"))
    if names:
        yield f"{len(names)} scales of a KV cache, {names[0]} and so on: {AS_ACTIVATIONS}"


def _settings(files: CheckpointFiles) -> Settings | None:
    where = f"{files.path}/config.json"
    text = files.config.get("text_config")
    for key, method in KEYS.items():
        value = files.config.get(key)
        if value is None and isinstance(text, dict):
            value = text.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {key} is {type(value).__name__}; expected an object")
        return Settings({"quant_method": method} | value, f"{where}: {key}")
    for name, method in FILES.items():
        value = files.json(name)
        if value is not None:
            named = value.get("method", method)  # as GPTQModel calls the key in this file
            return Settings({"quant_method": named} | value, f"{files.path}/{name}")
    return None
