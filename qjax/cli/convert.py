"""`qjax convert IN OUT`: a quantized folder in one format -> the same weights in another."""

import argparse
import time
from pathlib import Path

from qjax.checkpoints.load import load
from qjax.checkpoints.save import WRITERS, save
from qjax.checkpoints.weights import convert_weights
from qjax.checkpoints.write import check_target
from qjax.cli.opening import kernel_bytes, scheme_names
from qjax.cli.tables import show
from qjax.errors import CheckpointError
from qjax.explain import layers
from qjax.qtensor import is_qtensor

HELP = "write a quantized checkpoint in another format, its codes and scales as they are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT --to, --overwrite."""
    parser.add_argument("folder", metavar="IN", help="a quantized checkpoint folder, in any format that is read")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--to", choices=tuple(WRITERS), default="qjax", help="the format to write; default: qjax")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint folder")


def run(args: argparse.Namespace) -> None:
    """Reads, writes, and says what was written."""
    start = time.perf_counter()
    check_target(Path(args.out), source=args.folder, overwrite=args.overwrite)
    try:
        model = load(args.folder)
    except NotImplementedError as unknown:
        if args.to != "qjax":
            raise
        found = convert_weights(args.folder, args.out, overwrite=args.overwrite)
        schemes = ", ".join(dict.fromkeys(str(w.scheme) for w in found.values()))
        row = (args.to, schemes, str(len(found)), f"{sum(w.nbytes for w in found.values()):,}")
        notes = [f"its weights alone, for qjax.load does not know the model: {unknown}"]
    else:
        quantized = sum(is_qtensor(layer.kernel) for layer in layers(model))
        if not quantized:
            raise CheckpointError(f"{args.folder}: nothing in it is quantized; `qjax quantize` does that")
        save(model, args.out, source=args.folder, format=args.to, overwrite=args.overwrite)
        row = (args.to, scheme_names(model) or "", str(quantized), f"{kernel_bytes(model):,}")
        notes = list(model.notes)
    columns = ("format", "scheme", "layers", "bytes", "time")
    notes = [f"written to {args.out}; bytes are those of the layers' kernels", *notes]
    show(columns, [(*row, f"{time.perf_counter() - start:.1f} s")], right=columns[2:], notes=notes)
