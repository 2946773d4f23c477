"""`qjax quantize IN OUT`: a checkpoint folder -> one that holds quantized weights."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import qjax
from qjax.calibration import RECIPES, Nearest, Recipe, parse_recipe
from qjax.calibration.act_scale import ActScale, as_act_scale
from qjax.checkpoints.load import load
from qjax.checkpoints.save import save
from qjax.checkpoints.write import check_target
from qjax.cli.opening import SCHEME_HELP, WINDOW, count, kernel_bytes, read_text, read_windows, scheme_names
from qjax.cli.tables import show
from qjax.errors import CalibrationError, RuleError
from qjax.explain import layers
from qjax.qtensor import is_qtensor
from qjax.rules import EVERYTHING, Rule, parse_rules
from qjax.schemes import Scheme

HELP = "quantize a model, to nearest or by calibration, and write it as a folder that the other commands read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT --scheme | --rules, --recipe --calibrate --windows --act-scale --resume, --overwrite."""
    parser.add_argument("folder", metavar="IN", help="a checkpoint folder: config.json and safetensors")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--scheme", help=SCHEME_HELP + "; heads and embeddings are left alone")
    parser.add_argument(
        "--rules",
        metavar="FILE",
        help="lines `regex scheme` over paths such as layers/0/mlp/up_proj, the first that matches all of a path wins; "
        "`none` leaves a layer alone; --scheme is for the layers that no line matches",
    )
    parser.add_argument(
        "--recipe",
        help=f"how, if not to nearest: {', '.join(RECIPES)}; options follow a colon, as in gptq:order=static,passes=4",
    )
    parser.add_argument("--calibrate", metavar="FILE", help="UTF-8 text that --recipe looks at layers' inputs on")
    parser.add_argument(
        "--windows",
        type=count,
        default=128,
        metavar="N",
        help=f"the first N windows of {WINDOW} tokens of it (default 128)",
    )
    parser.add_argument(
        "--act-scale",
        metavar="HOW",
        help="of schemes with static scales of x, from --calibrate: max (default), mse or a percentile such as 99.99",
    )
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="keep finished layers in FOLDER; after an interruption the same command goes on from there",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint folder")


def run(args: argparse.Namespace) -> None:
    """Quantizes and writes, then says what became of the bytes."""
    import qjax.nnx
    from qjax.calibration.calibrate import calibrate

    rules = _rules(args)
    recipe = _recipe(args, rules)
    act_scale = _act_scale(args.act_scale, rules)
    out = Path(args.out)
    check_target(out, source=args.folder, overwrite=args.overwrite)  # before the work, too
    start = time.perf_counter()
    batches = None if args.calibrate is None else read_windows(args.folder, args.calibrate, args.windows)
    model = load(args.folder)
    before = kernel_bytes(model)
    if recipe is None:
        qjax.nnx.quantize(model, rules)
    else:
        calibrate(model, batches, recipe, rules, act_scale=act_scale, resume=args.resume)
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


def _recipe(args: argparse.Namespace, rules: Sequence[Rule]) -> Recipe | None:
    """None is to nearest, without a look at data."""
    static = _static(rules)
    if args.recipe is None and args.calibrate is not None and static is None:
        raise CalibrationError(f"--calibrate {args.calibrate}: give --recipe R, one of {', '.join(RECIPES)}")
    recipe = None if args.recipe is None else parse_recipe(args.recipe)
    if args.resume is not None and recipe is None and static is None:
        raise CalibrationError(f"--resume {args.resume}: rounding to nearest has nothing to resume; give --recipe R")
    what = static and f"scheme {static}" or recipe and recipe.needs_data and f"recipe {recipe}"
    if what and args.calibrate is None:
        raise CalibrationError(f"{what} looks at what enters layers: give --calibrate FILE")
    return Nearest() if recipe is None and static is not None else recipe


def _static(rules: Sequence[Rule]) -> Scheme | None:
    """The first scheme that has static scales of x."""
    return next((rule.scheme for rule in rules if rule.scheme is not None and rule.scheme.is_static), None)


def _act_scale(text: str | None, rules: Sequence[Rule]) -> ActScale:
    if text is None:
        return "max"
    try:
        found = as_act_scale(text if text in ("max", "mse") else float(text))
    except ValueError:
        raise CalibrationError(
            f"--act-scale {text}: neither max, mse nor a percentile, above 0 and up to 100"
        ) from None
    if _static(rules) is None:
        raise CalibrationError(
            f"--act-scale {text}: no scheme here has static scales of x, as w8a8_int8:mode=static has"
        )
    return found


def _file_rules(file: str | None) -> tuple[Rule, ...]:
    return () if file is None else parse_rules(read_text(file), file)
