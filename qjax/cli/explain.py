"""`qjax explain DIR`: which kernel each layer runs on, why, and why not each of the others."""

import argparse
import re
from collections.abc import Iterable

import qjax
from qjax.cli.opening import SCHEME_HELP, count, open_model
from qjax.cli.tables import show
from qjax.dispatch.explain import COLUMNS, Row
from qjax.explain import explain

HELP = "say which kernel runs each layer, and why not another"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR, and the circumstances to explain it under."""
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder: config.json and safetensors")
    parser.add_argument("--scheme", help=f"as if it were quantized so; {SCHEME_HELP}")
    parser.add_argument(
        "--rows", type=count, default=1, metavar="M", help="rows of x; 1 (default) is a token at a time"
    )
    parser.add_argument("--device", help="a device of `qjax devices`; default: this machine's")
    parser.add_argument("--backend", help="as if these kernels were asked for")


def run(args: argparse.Namespace) -> None:
    """Prints the table of `qjax.explain`, alike layers in one row."""
    with qjax.use(device=args.device, backend=args.backend):
        found = explain(open_model(args.folder, scheme=args.scheme), args.rows)
    others = [f"{kernel} not taken: {why} ({n} layers)" for (kernel, why), n in found.not_taken.items()]
    notes = [*others, *found.notes]
    show((*COLUMNS, "layers"), _merged(found.rows), title=f"on {found.device}", right=["layers"], notes=notes)


def _merged(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Rows that differ in the numbers of their paths only, as one with `*` for those and a count."""
    counts: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike = re.sub(r"\d+", "*", row.layer)
        counts.setdefault((alike, *row.cells[1:]), []).append(row.layer)
    return [(paths[0] if len(paths) == 1 else key[0], *key[1:], str(len(paths))) for key, paths in counts.items()]
