"""`read_weights`: the quantized weights of a folder by name, whatever model they belong to."""

import os

from qjax.checkpoints.detect import source
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.hub import local_folder
from qjax.checkpoints.load import checked, on_device
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
    files = CheckpointFiles.open(local_folder(path))
    opened = source(files)
    if opened is None:
        raise CheckpointError(f"{files.path}/config.json: no quantization_config; its weights are not quantized")
    # A mark begins after the module's name; that of gpt-oss does with `_`, others with a dot.
    marks = tuple(mark if mark[0] in "._" else f".{mark}" for mark in opened.marks)
    modules = {name.removesuffix(mark) for name in files for mark in marks if name.endswith(mark)}
    found = {}
    for module in sorted(modules):
        read = opened.read(module)
        if read is not None:
            found[module] = on_device(checked(read[0], f"{files.path}: {module}.weight"))
    return found
