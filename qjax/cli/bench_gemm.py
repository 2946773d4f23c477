"""`qjax bench gemm`: how fast products are on this machine, each beside bfloat16 in the same run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax import devices
from qjax.bench import cases
from qjax.bench.gemm import bench_gemm
from qjax.bench.predict import predict
from qjax.bench.programs import FULL, QUICK
from qjax.bench.records import Record, Results, key_of
from qjax.cli.sizes import add_sizes, sizes_of
from qjax.cli.tables import show

HELP = "measure products y = x @ w of many sizes, schemes and backends"

COLUMNS = (
    "N x K", "m", "scheme", "backend", "kernel", "us", "spread", "in kernels", "bf16 us", "speedup", "bandwidth",
    "rate", "error",
)  # fmt: skip
NOTES = (
    "us: median wall time of a call in one jitted loop; spread: (max - min) / median over runs; in kernels: by the "
    "profiler;",
    "bandwidth: least bytes over time, of this machine's copy; rate: operations over time, of its bf16 product;",
    "error: relative to the exact product, and how many times that of rounding it once",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and where to leave it."""
    add_sizes(parser, shapes=cases.SHAPES, rows=cases.ROWS, schemes=cases.SCHEMES)
    parser.add_argument("--backends", metavar="B,...", default=cases.BACKENDS, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speedups and the roofline as a PNG")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")


def run(args: argparse.Namespace, results: Results) -> None:
    """Measures, and prints what was asked for, also what `results` had before."""
    schemes, rows, shapes = sizes_of(args)
    wanted = cases.cases_of(schemes, cases.parse_backends(args.backends), rows, shapes)
    bench_gemm(wanted, results, effort=QUICK if args.quick else FULL, budget=args.limit, report=_tell)
    keys = {case.key for case in wanted}
    records = [record for record in results if key_of(record) in keys]
    _print(records, results)
    if args.plot is not None:
        _plot(args.plot, records)


def _print(records: Sequence[Record], results: Results) -> None:
    machine = results.machine
    title = (
        f"{machine['device']}: {machine['bandwidth'] / 1e9:.0f} GB/s copied, "
        f"{machine['bf16_rate'] / 1e12:.3g} TFLOP/s in bf16, jax {machine['jax']}"
    )
    reasons: dict[str, str] = {}  # the first for each scheme and backend: the others say the same of other sizes
    for one in results.failures:
        reasons.setdefault(f"not measured: {one['scheme']} on {one['backend']}", one["error"])
    notes = [*NOTES, *(f"{what}: {why}" for what, why in reasons.items())]
    show(COLUMNS, map(_cells, records), title=title, right=(COLUMNS[1], *COLUMNS[5:]), notes=notes)


def _tell(record: Record) -> None:
    """One record, to somebody who waits."""
    if sys.stderr.isatty():
        print(*(cell for cell in _cells(record)[:10] if cell is not None), sep="  ", file=sys.stderr, flush=True)


def _cells(record: Record) -> tuple[Any, ...]:
    spread = (record["us_max"] - record["us_min"]) / record["us"]
    return (
        f"{record['n']} x {record['k']}",
        record["m"],
        record["scheme"],
        record["backend"],
        record["route"],
        f"{record['us']:.1f}",
        f"{spread:.1%}",
        None if record["kernel_us"] is None else f"{record['kernel_us']:.1f}",
        f"{record['bf16_us']:.1f}",
        f"{record['speedup']:.2f}x",
        f"{record['share_of_bandwidth']:.0%}",
        f"{record['share_of_bf16_rate']:.0%}",
        f"{record['rel_err']:.1e} ({record['err_ratio']:.2f})",
    )


def _plot(path: Path, records: Sequence[Record]) -> None:
    """Measured lines, and the prediction for each of their points."""
    from qjax.bench.plot import plot_speedups
    from qjax.schemes import parse_scheme

    device = devices.current()
    points = dict.fromkeys((r["scheme"], r["m"], r["n"], r["k"]) for r in records)
    expected = [predict(device, parse_scheme(scheme), m, n, k) for scheme, m, n, k in points]
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_speedups(records, expected, title=f"y = x @ w on {device.name}").savefig(path, dpi=150)
