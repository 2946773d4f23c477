"""What several subcommands share: their arguments, and a model from a folder, quantized on the fly where asked."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import qjax
from qjax.calibration import windows
from qjax.checkpoints import detect
from qjax.checkpoints.hub import local_folder
from qjax.checkpoints.load import load
from qjax.errors import QJaxError
from qjax.explain import layers
from qjax.models.tokenizer import Tokenizer, load_tokenizer
from qjax.qtensor import is_qtensor

if TYPE_CHECKING:
    from qjax.models.llama import Llama

SCHEME_HELP = (
    f"how to quantize: {', '.join(qjax.SCHEMES)}; options follow a colon, as in w4a16:group_size=64,symmetric=false"
)


WINDOW = 512  # tokens of a text that are looked at together


def add_model(parser: argparse.ArgumentParser) -> None:
    """DIR, and how to run what is in it."""
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder: config.json and safetensors")
    add_backend_and_dtype(parser)


def add_backend_and_dtype(parser: argparse.ArgumentParser) -> None:
    """How to run a model."""
    parser.add_argument("--backend", help="the kernels to use; default: the fastest for each layer")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations; default: what the device's tensor cores take, float32 on a CPU",
    )


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Where text becomes tokens."""
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder with tokenizer.json; default: DIR")


def read_text(file: str) -> str:
    """A text file.

    Raises:
      QJaxError: there is none, or it is not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise QJaxError(f"{file}: {error.strerror}; expected a file of UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise QJaxError(f"{file}: not UTF-8 text at byte {error.start}") from error


def count(text: str) -> int:
    """An argument that counts something.

    Raises:
      argparse.ArgumentTypeError: not an integer, or below 1.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer, at least 1")
    return int(text)


def make_room(*files: Path | None) -> None:
    """Makes the folders of files that will be written, those that were asked for, before the work that they are for.

    Raises:
      QJaxError: where a file should go there is a folder.
    """
    for file in filter(None, files):
        if file.is_dir():
            raise QJaxError(f"{file}: is a folder; expected the name of a file to write")
        file.parent.mkdir(parents=True, exist_ok=True)


def open_tokenizer(folder: str, other: str | None = None) -> Tokenizer:
    """The tokenizer in the folder `other`, by default in the model's own, which has to be one that can be read.

    Raises:
      CheckpointError: what is wrong with the model's folder, or with the tokenizer.
    """
    detect.opened(local_folder(folder))
    return load_tokenizer(folder if other is None else other)


def read_tokens(tokenizer: Tokenizer, file: str) -> list[int]:
    """A text as tokens, none of them special.

    Raises:
      QJaxError: there is no such text, or it is shorter than a window.
    """
    ids = tokenizer.encode(read_text(file), add_special_tokens=False)
    if len(ids) < WINDOW:
        raise QJaxError(f"{file}: the text has {len(ids)} tokens; expected at least one window of {WINDOW} tokens")
    return ids


def read_windows(folder: str, file: str, count: int) -> list[np.ndarray]:
    """The first windows of a text in a model's tokens, in batches as calibration takes them."""
    return windows(read_tokens(open_tokenizer(folder), file), window=WINDOW, count=count)


@contextmanager
def backend_of(args: argparse.Namespace) -> Iterator[None]:
    """Within it, products run on the backend that was asked for, if one was."""
    with qjax.use(backend=args.backend):
        yield


def open_model(
    folder: str, dtype: str | None = None, scheme: str | None = None, *, activations: str = "checkpoint"
) -> "Llama":
    """The model in a folder, its layers quantized if a scheme is given; heads and embeddings are left alone.

    `activations`, as of `qjax.load`, says how a folder that is quantized already treats them.
    """
    import qjax.nnx

    parsed = None if scheme is None else qjax.parse_scheme(scheme)  # a wrong one fails before anything is loaded
    model = load(folder, dtype=dtype, activations=activations)
    if parsed is not None:
        qjax.nnx.quantize(model, parsed)
    return model


def kernel_bytes(model: "Llama") -> int:
    """What the kernels of a model weigh, quantized or not: no embeddings, norms and biases."""
    return sum(layer.kernel.nbytes for layer in layers(model) if layer.name == "kernel")


def quantizes_activations(model: "Llama") -> bool:
    """Whether a layer rounds its input."""
    return any(is_qtensor(layer.kernel) and layer.kernel.scheme.activation is not None for layer in layers(model))


def scheme_names(model: "Llama") -> str | None:
    """The schemes in a model, `a, b` where it has several; None where nothing is quantized."""
    found = {str(layer.kernel.scheme): None for layer in layers(model) if is_qtensor(layer.kernel)}
    return ", ".join(found) or None
