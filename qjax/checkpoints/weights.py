"""Quantized weights of a folder by name, whatever model they belong to: read, and written in QJAX's own format."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qjax.checkpoints import native
from qjax.checkpoints.detect import source
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.hub import local_folder
from qjax.checkpoints.load import checked, on_device
from qjax.checkpoints.save import beside
from qjax.checkpoints.write import write_folder
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor


def read_weights(path: str | os.PathLike[str]) -> dict[str, QTensor]:
    """Every quantized weight of a checkpoint folder, on the default device.

    Args:
      path: a local folder in a format of `qjax.checkpoints.detect.READERS`; its model may be of any family.

    Returns:
      Module's name in the file -> QTensor `[K, N]`, or `[E, K, N]` for experts in one tensor (gpt-oss).

    Raises:
      CheckpointError: the folder is malformed or not quantized.
    """
    return {module: w for module, w, _ in _weights(CheckpointFiles.open(local_folder(path)))}


def convert_weights(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, QTensor]:
    """Writes a folder, its model being of any family, in QJAX's own format, which `read_weights` reads.

    Args:
      path: as of `read_weights`; what is not quantized in it is copied as it is.
      out: the folder to make.
      overwrite: replace `out` if it is a checkpoint folder.

    Returns:
      What `read_weights` finds in either.

    Raises:
      CheckpointError: `path` is malformed or not quantized; `out` exists.
    """
    folder = local_folder(path)
    files = CheckpointFiles.open(folder)
    found, arrays, taken = {}, dict[str, Any](), set[str]()
    for module, w, names in _weights(files):
        found[module] = w
        arrays |= native.to_arrays(w, f"{module}.weight")
        taken |= set(names)
    arrays |= {name: files[name] for name in files if name not in taken}
    config, carried = beside(Path(folder), files.config)
    config["quantization_config"] = native.config(found)
    write_folder(out, tensors=arrays, config=config, extra_files=carried, overwrite=overwrite)
    return found


def _weights(files: CheckpointFiles) -> Iterator[tuple[str, QTensor, tuple[str, ...]]]:
    """(module, its weight, the names of its tensors in the folder)."""
    opened = source(files)
    if opened is None:
        raise CheckpointError(f"{files.path}/config.json: no quantization_config; its weights are not quantized")
    # A mark begins after the module's name; that of gpt-oss does with `_`, others with a dot.
    marks = tuple(mark if mark[0] in "._" else f".{mark}" for mark in opened.marks)
    modules = {name.removesuffix(mark) for name in files for mark in marks if name.endswith(mark)}
    for module in sorted(modules):
        read = opened.read(module)
        if read is not None:
            yield module, on_device(checked(read[0], f"{files.path}: {module}.weight")), read[1]
