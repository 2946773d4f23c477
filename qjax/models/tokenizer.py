"""Text <-> token ids, by the checkpoint's own tokenizer.json. Apart from the weights on purpose."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qjax.checkpoints.hub import local_folder
from qjax.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


class Tokenizer:
    """A thin face of a `tokenizers.Tokenizer`, which is its `.backend`."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self.backend = backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones too."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special ones (begin of text) that the file adds."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in the folder `path`, or under that name on the hub.

    Raises:
      CheckpointError: the folder has no tokenizer.json, or one that `tokenizers` cannot read.
    """
    import tokenizers

    folder = local_folder(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; expected a folder with a {FILE}")
    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file; another folder's {FILE} will do (on the command line --tokenizer DIR)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    return Tokenizer(backend)
