"""Names of Hugging Face's hub -> local folders: `org/name` is downloaded where no folder of that name exists."""

import os
import re
from pathlib import Path

from qjax.errors import CheckpointError

# What a checkpoint is made of; never pickles, never code.
FILES = ["*.safetensors", "*.json", "tokenizer*", "LICENSE*", "NOTICE*", "vocab.*", "merges.txt", "chat_template*"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, or the download of the hub's repository of that name (through the hub's own cache).

    Raises:
      CheckpointError: no such folder, and it is no name of the hub, or the hub has none or cannot be reached.
    """
    folder = Path(path)
    name = os.fspath(path)
    if os.path.lexists(folder) or not isinstance(name, str) or folder.suffix == ".gguf" or not _NAME.fullmatch(name):
        return folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{name}: does not exist, and the hub has no such name or is out of reach: {why}"
        ) from error
