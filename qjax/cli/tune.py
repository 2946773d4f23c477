"""`qjax tune`: the fastest configuration of each kernel on this machine, written to a table that products consult."""

import argparse
from pathlib import Path

from qjax import devices
from qjax.bench import cases
from qjax.bench.tuner import tasks_of, tune
from qjax.cli.sizes import add_sizes, sizes_of
from qjax.cli.tables import show
from qjax.dispatch import tuning
from qjax.dispatch.tuning import Entry

HELP = "measure the configurations of kernels on this machine, and remember the fastest"

COLUMNS = ("kernel", "scheme", "N x K", "m", "us", "config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to tune, for how long, and where the table is."""
    add_sizes(parser, shapes=cases.SHAPES, rows=cases.ROWS, schemes=cases.SCHEMES)
    parser.add_argument("--routes", metavar="R,...", help="kernels, by the names of `qjax explain`; default: all")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing new after that")
    parser.add_argument("--configs", type=int, metavar="N", help="try at most N of a kernel's, spread evenly")
    parser.add_argument("--again", action="store_true", help="measure what the table has, too")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="of the table; default: $QJAX_TUNING_DIR or ~/.cache/qjax/tuning"
    )


def run(args: argparse.Namespace) -> None:
    """Tunes, then prints what was found."""
    schemes, rows, shapes = sizes_of(args)
    names = None if args.routes is None else [name.strip() for name in args.routes.split(",")]
    tasks = tasks_of(schemes, rows, shapes, names)
    found: list[Entry] = []
    left = tune(
        tasks,
        directory=args.output,
        budget=args.limit,
        most_configs=args.configs,
        again=args.again,
        report=found.append,
    )
    device = devices.current()
    path = (args.output or tuning.user_directory()) / tuning.file_name(device.name)
    notes = [f"written to {path}" if found else f"nothing new for {path}"]
    if left:
        notes.append(f"{left} of {len(tasks)} are left: the same command goes on with them")
    show(COLUMNS, map(_cells, found), title=f"on {device}", right=COLUMNS[3:5], notes=notes)


def _cells(entry: Entry) -> tuple[object, ...]:
    config = ", ".join(f"{name}={value}" for name, value in entry.config) or "its own choice"
    return entry.kernel, entry.scheme, f"{entry.n} x {entry.k}", entry.m, f"{entry.microseconds:.1f}", config
