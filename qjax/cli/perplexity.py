"""`qjax perplexity DIR --text FILE`: how well a model predicts a text, and how far it is from its base."""

import argparse
import json
from functools import partial
from typing import Any

from qjax.cli.opening import (
    SCHEME_HELP,
    WINDOW,
    add_model,
    add_tokenizer,
    backend_of,
    count,
    kernel_bytes,
    open_model,
    open_tokenizer,
    quantizes_activations,
    read_tokens,
    scheme_names,
)
from qjax.cli.tables import show
from qjax.models.perplexity import perplexity

HELP = "measure perplexity on a text, and the distance to a base model"

BATCH = 8  # windows at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR --text, and what to compare."""
    add_model(parser)
    add_tokenizer(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text, tokenised without special tokens")
    parser.add_argument("--windows", type=count, metavar="N", help=f"only the first N windows of {WINDOW} tokens")
    parser.add_argument("--scheme", help=f"quantize on the fly and compare with DIR as it is; {SCHEME_HELP}")
    parser.add_argument("--base", metavar="DIR", help="compare with the model in this folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    ids = read_tokens(open_tokenizer(args.folder, args.tokenizer), args.text)
    batch = min(BATCH, args.windows or BATCH)
    measure = partial(perplexity, token_ids=ids, window=WINDOW, max_windows=args.windows, batch_size=batch)
    rounded: dict[str, Any] = {}
    with backend_of(args):
        model = open_model(args.folder, args.dtype, args.scheme)
        if args.scheme is None and quantizes_activations(model):
            rounded = {"perplexity_activations": measure(model).perplexity}
            model = open_model(args.folder, args.dtype, activations="none")
        base_folder = args.base or (args.folder if args.scheme else None)
        base = None if base_folder is None else open_model(base_folder, args.dtype)
        found = measure(model, base=base)
    result: dict[str, Any] = {
        "perplexity": found.perplexity,
        **rounded,
        "windows": found.windows,
        "tokens": found.tokens,
        "bytes": kernel_bytes(model),
        "scheme": scheme_names(model),
    }
    if base is not None:
        result |= {"kl": found.kl, "top1": found.top1}
    if args.json:
        print(json.dumps(result))
        return
    notes = ["bytes are those of the layers' kernels; tokens counts the predictions"]
    if rounded:
        notes.append("perplexity is with activations as they are, perplexity_activations as the folder quantizes them")
    if base is not None:
        notes.append(f"kl (nats) and top1 (share of predictions with the same likeliest token) are to {base_folder}")
    show(list(result), [[_cell(value) for value in result.values()]], notes=notes)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5f}"
    return f"{value:,}" if isinstance(value, int) else value or "none"
