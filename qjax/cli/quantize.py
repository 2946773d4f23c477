"""`qjax quantize IN OUT`: a checkpoint folder -> one that holds quantized weights."""

import argparse
import time
from pathlib import Path

import qjax
from qjax.checkpoints.load import load
from qjax.checkpoints.save import save
from qjax.checkpoints.write import check_target
from qjax.cli.opening import SCHEME_HELP, kernel_bytes, scheme_names
from qjax.cli.tables import show
from qjax.errors import RuleError
from qjax.explain import layers
from qjax.qtensor import is_qtensor
from qjax.rules import EVERYTHING, Rule, parse_rules

HELP = "quantize a model to nearest and write it as a folder that the other commands read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT --scheme | --rules, --overwrite."""
    parser.add_argument("folder", metavar="IN", help="a checkpoint folder: config.json and safetensors")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--scheme", help=SCHEME_HELP + "; heads and embeddings are left alone")
    parser.add_argument(
        "--rules",
        metavar="FILE",
        help="lines `regex scheme` over paths such as layers/0/mlp/up_proj, the first that matches all of a path wins; "
        "`none` leaves a layer alone; --scheme is for the layers that no line matches",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint folder")


def run(args: argparse.Namespace) -> None:
    """Quantizes and writes, then says what became of the bytes."""
    import qjax.nnx

    rules = _rules(args)
    out = Path(args.out)
    check_target(out, source=args.folder, overwrite=args.overwrite)  # before the work, too
    start = time.perf_counter()
    model = load(args.folder)
    before = kernel_bytes(model)
    qjax.nnx.quantize(model, rules)
    save(model, out, source=args.folder, overwrite=args.overwrite)
    found = list(layers(model))
    after = kernel_bytes(model)
    row = (
        scheme_names(model),
        f"{sum(is_qtensor(layer.kernel) for layer in found)} of {len(found)}",
        f"{before:,}",
        f"{after:,}",
        f"{before / after:.2f}x",
        f"{time.perf_counter() - start:.1f} s",
    )
    columns = ("scheme", "layers", "bytes before", "bytes after", "ratio", "time")
    show(columns, [row], right=columns[2:], notes=[f"written to {out}; bytes are those of the layers' kernels"])


def _rules(args: argparse.Namespace) -> tuple[Rule, ...]:
    """The rules of the file, then the scheme for every other layer."""
    if args.scheme is None and args.rules is None:
        raise RuleError("nothing to do: give --scheme S, --rules FILE or both")
    scheme = () if args.scheme is None else (Rule(EVERYTHING, qjax.parse_scheme(args.scheme)),)
    return (*_file_rules(args.rules), *scheme)


def _file_rules(file: str | None) -> tuple[Rule, ...]:
    if file is None:
        return ()
    try:
        return parse_rules(Path(file).read_text(encoding="utf-8"), file)
    except UnicodeDecodeError as error:
        raise RuleError(f"{file}: not UTF-8 text at byte {error.start}") from error
