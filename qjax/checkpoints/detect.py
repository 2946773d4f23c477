"""Which format a folder is in: its `quantization_config`, or the file that older tools wrote beside config.json."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from qjax.checkpoints import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, hqq, mxfp4, native
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.source import Settings, Source
from qjax.errors import CheckpointError

# quant_method of config.json -> what reads a folder in that format.
READERS: dict[str, Callable[[CheckpointFiles, Settings], Source]] = {
    native.METHOD: lambda files, settings: Source(native.reader(files), native.MARKS, ours=True),
    "gptq": gptq.reader,
    "awq": awq.reader,
    "compressed-tensors": compressed_tensors.reader,
    "fp8": fp8.reader,
    "bitsandbytes": bitsandbytes.reader,
    "mxfp4": mxfp4.reader,
    "hqq": hqq.reader,
}

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
    if not isinstance(method, str) or method not in READERS:
        raise settings.error("quant_method", f"one of {', '.join(READERS)}")
    found = READERS[method](files, settings)
    hints = tuple(f"{key}={settings.get(key)!r}: {instead}" for key, instead in HINTS.items() if key in settings)
    return dataclasses.replace(found, notes=(*found.notes, *hints))


def _settings(files: CheckpointFiles) -> Settings | None:
    where = f"{files.path}/config.json"
    for key, method in KEYS.items():
        value = files.config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {key} is {type(value).__name__}; expected an object")
        return Settings({"quant_method": method} | value, f"{where}: {key}")
    for name, method in FILES.items():
        value = files.json(name)
        if value is not None:
            return Settings({"quant_method": method} | value, f"{files.path}/{name}")
    return None
