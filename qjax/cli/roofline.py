"""`qjax roofline`: what the capability table lets one expect of products, without a GPU."""

import argparse
import json

from qjax import devices
from qjax.bench import cases
from qjax.bench.predict import Prediction, predict
from qjax.cli.sizes import add_sizes, sizes_of
from qjax.cli.tables import show
from qjax.dispatch.roofline import CEILING, format_seconds

HELP = "predict time and speedup over bf16 from the capability table"

COLUMNS = ("N x K", "scheme", "m", "bytes", "operations", "time", "bf16", "speedup", "bound by")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The device, the sizes, and the form of the answer."""
    parser.add_argument("--device", help="a device of `qjax devices`; default: this machine's")
    add_sizes(parser, shapes="22016x4096", rows="1,16,64,256,2048", schemes=cases.SCHEMES)
    parser.add_argument("--json", action="store_true", help="print one JSON list, in bytes and microseconds")


def run(args: argparse.Namespace) -> None:
    """Prints a row for each product."""
    schemes, rows, shapes = sizes_of(args)
    device = devices.find_device(args.device) if args.device else devices.current()
    found = [predict(device, scheme, m, n, k) for n, k in shapes for scheme in schemes for m in rows]
    if args.json:
        print(json.dumps([one._asdict() for one in found]))
        return
    notes = [
        "the fastest that a fused kernel could be: "
        f"{CEILING.bandwidth:.0%} of peak bandwidth, {CEILING.rate:.0%} of peak rates, "
        f"{format_seconds(CEILING.fixed)} to start ({CEILING.source})"
    ]
    if device.estimated:
        notes.append(f"the row of {device.name} is rough: {device.source}")
    show(COLUMNS, map(_cells, found), title=f"on {device}", right=COLUMNS[2:8], notes=notes)


def _cells(one: Prediction) -> tuple[str, ...]:
    return (
        f"{one.n} x {one.k}",
        one.scheme,
        str(one.m),
        f"{one.bytes:,}",
        f"{one.operations:.3g}",
        format_seconds(one.us * 1e-6),
        format_seconds(one.bf16_us * 1e-6),
        f"{one.speedup:.2f}x",
        one.bound,
    )
