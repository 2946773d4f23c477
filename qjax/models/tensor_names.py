"""What a Llama's tensors are called in a folder, and which tensors of it are another model's.

Folders that also see (Gemma 3, LLaVA, Mistral 3) hold the text model under a prefix, which has changed over time, and
its shape in `text_config`. They are read for the text alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What stands before `embed_tokens` and `layers`: transformers' own, models that see (before 4.52 and since), a model
# saved without its head.
ROOTS = ("model.", "language_model.model.", "model.language_model.", "")
HEADS = ("lm_head", "language_model.lm_head")

# Parts of models that see.
VISION = r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector|mm_projector)\..*"

# Keys beside `text_config` that hold for the text too.
SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype", "dtype")


@dataclass(frozen=True)
class TensorNames:
    """Where the parts of a Llama are: `root` before the names of its modules, `head` the head's whole name."""

    root: str = ROOTS[0]
    head: str = HEADS[0]

    def prefix(self, path: str) -> str:
        """The name in the file of the module at `path`, such as "layers.0.mlp.up_proj"."""
        return self.head if path == "lm_head" else f"{self.root}{path}"


def names_in(tensors: Iterable[str]) -> TensorNames:
    """Those that the tensors of a folder have; transformers' own where none fits."""
    tensors = list(tensors)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    root = next((root for root in ROOTS if has(f"{root}layers.") or has(f"{root}embed_tokens.")), ROOTS[0])
    return TensorNames(root, next((head for head in HEADS if has(f"{head}.")), HEADS[0]))


def vision_tensors(tensors: Iterable[str]) -> list[str]:
    """Those of a vision tower and of what joins it to the text."""
    return [name for name in tensors if re.fullmatch(VISION, name)]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model: `text_config` where there is one, with what is said beside it."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(config)
    return dict(text) | {key: config[key] for key in SHARED if text.get(key) is None and key in config}
