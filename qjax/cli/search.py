"""`qjax search DIR --budget-bits B --calibrate FILE`: the scheme of each layer, as rules for `qjax quantize`."""

import argparse
import json
from pathlib import Path

from qjax.budget.mixture import Mixture
from qjax.budget.search import CANDIDATES, search
from qjax.calibration import RECIPES
from qjax.cli.opening import SCHEME_HELP, WINDOW, count, make_room, open_model, read_windows
from qjax.cli.tables import show

HELP = "find the scheme of each layer that loses least within a budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR --budget-bits | --budget-bytes, --calibrate --windows, what to choose from, where to leave it."""
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder: config.json and safetensors")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-bits", type=float, metavar="B", help="bits a weight on average, scales counted")
    budget.add_argument("--budget-bytes", type=int, metavar="N", help="bytes of the layers' kernels together")
    parser.add_argument("--calibrate", metavar="FILE", required=True, help="UTF-8 text to measure layers on")
    parser.add_argument(
        "--windows",
        type=count,
        default=8,
        metavar="N",
        help=f"the first N windows of {WINDOW} tokens of it (default 8)",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="SCHEME",
        help=f"what to choose from, `none` for as it is; {SCHEME_HELP}; default: {' '.join(CANDIDATES)}",
    )
    parser.add_argument(
        "--layers", action="append", metavar="REGEX", help="search these only; may be repeated; default: all but heads"
    )
    parser.add_argument(
        "--together",
        action="append",
        default=[],
        metavar="REGEX",
        help="one scheme for layers of one parent whose names match, as in [qkv]_proj; may be repeated",
    )
    parser.add_argument("--recipe", help=f"how layers will be quantized, if not to nearest: {', '.join(RECIPES)}")
    parser.add_argument("--rules", type=Path, metavar="FILE", help="write rules for `qjax quantize --rules`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the choice and what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what is lost against bits a weight, as a PNG")


def run(args: argparse.Namespace) -> None:
    """Searches, prints, and writes what was asked for."""
    named: list[str | None] | None = None
    if args.candidates is not None:
        named = [None if one == "none" else one for one in args.candidates]
    make_room(args.rules, args.json, args.plot)
    batches = read_windows(args.folder, args.calibrate, args.windows)
    found = search(
        open_model(args.folder),
        batches,
        budget_bits=args.budget_bits,
        budget_bytes=args.budget_bytes,
        candidates=named,
        layers=args.layers or ".*",
        together=args.together,
        recipe=args.recipe,
    )
    if args.rules is not None:
        args.rules.write_text(found.text, encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        found.plot().savefig(args.plot, dpi=150)
    _print(found)


def _print(found: Mixture) -> None:
    """The layers, then the whole beside uniform schemes."""
    columns: tuple[str, ...] = ("layer", "scheme", "bits/weight", "expected KL")
    rows: list[tuple[object, ...]] = [
        (layer.path, one.scheme or "none", f"{8 * one.nbytes / layer.size:.3f}", f"{one.loss:.3g}")
        for layer, one in zip(found.layers, found.choice, strict=True)
    ]
    show(columns, rows, right=columns[2:])
    points = sorted([*found.uniform(), found.point], key=lambda point: point.nbytes)
    columns = ("every layer", "bytes", "bits/weight", "expected KL")
    rows = [(p.name, f"{p.nbytes:,}", f"{p.bits:.3f}", f"{p.loss:.4g}") for p in points]
    show(columns, rows, right=columns[1:], notes=["KL in nats to the float model, as if losses of layers added up"])
