"""`qjax compare BASE QUANTIZED --text FILE`: how far a model is from its base, token by token and layer by layer."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax.cli.opening import (
    WINDOW,
    add_backend_and_dtype,
    backend_of,
    count,
    kernel_bytes,
    make_room,
    open_model,
    open_tokenizer,
    read_tokens,
    scheme_names,
)
from qjax.cli.tables import show
from qjax.quality.compare import compare
from qjax.quality.comparison import LAYER_COLUMNS, Comparison
from qjax.quality.page import page

HELP = "measure how far a quantized model is from its base, token by token and layer by layer"

BATCH = 4  # windows at a time
NAMED = 3  # channels that a row names

NOTES = (
    "SQNR: of a layer's outputs against the base's, with all layers before it, and by itself on the base's input;",
    "noisiest outputs: with their share of the layer's own noise; outliers: channels of x, max |x| over rms of x",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE QUANTIZED --text, and where to leave what was found."""
    parser.add_argument("base", metavar="BASE", help="the folder to compare with, dense or quantized")
    parser.add_argument("folder", metavar="QUANTIZED", help="the folder to judge")
    add_backend_and_dtype(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder with tokenizer.json; default: BASE")
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text, tokenised without special tokens")
    parser.add_argument("--windows", type=count, metavar="N", help=f"only the first N windows of {WINDOW} tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots that opens offline")


def run(args: argparse.Namespace) -> None:
    """Measures, prints, and writes what was asked for."""
    ids = read_tokens(open_tokenizer(args.base, args.tokenizer), args.text)
    make_room(args.json, args.html)
    with backend_of(args):
        base, model = (open_model(folder, args.dtype) for folder in (args.base, args.folder))
        batch = min(BATCH, args.windows or BATCH)
        found = compare(base, model, ids, window=WINDOW, max_windows=args.windows, batch_size=batch)
    facts = {
        name: {"folder": folder, "scheme": scheme_names(one), "bytes": kernel_bytes(one)}
        for name, folder, one in (("base", args.base, base), ("model", args.folder, model))
    }
    _print(found, facts)
    if args.json is not None:
        args.json.write_text(json.dumps(facts | found.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.html is not None:
        lines = {name: f"{f['folder']}: {f['scheme'] or 'float'}, {f['bytes']:,} bytes" for name, f in facts.items()}
        args.html.write_text(page(found, title=f"{args.folder} beside {args.base}", facts=lines), encoding="utf-8")


def _print(found: Comparison, facts: dict[str, dict[str, Any]]) -> None:
    """The layers, then both models."""
    show(LAYER_COLUMNS, [layer.cells(NAMED) for layer in found.layers], right=LAYER_COLUMNS[3:5], notes=NOTES)
    columns = ("", "bytes", "perplexity", "kl", "kl max", "top1", "scheme")
    table: list[Sequence[object]] = [
        ("base", f"{facts['base']['bytes']:,}", f"{found.base_perplexity:.5f}", None, None, None),
        (
            "model",
            f"{facts['model']['bytes']:,}",
            f"{found.perplexity:.5f}",
            f"{found.mean_kl:.5f}",
            f"{found.kl.max():.5f}",
            f"{found.top1:.5f}",
        ),
    ]
    rows = [(*row, facts[str(row[0])]["scheme"] or "none") for row in table]
    note = f"{found.kl.size:,} predictions in {len(found.kl)} windows; bytes are those of the layers' kernels"
    show(columns, rows, right=columns[1:6], notes=[note])
