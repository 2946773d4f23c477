"""`qjax bench decode`: how many tokens a second a model writes on this machine, by scheme and batch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qjax.bench import cases
from qjax.bench.decode import RUNS, STEPS, bench_decode, bound_of, breakdown, decode_cases
from qjax.bench.models import GEOMETRIES, check_name
from qjax.bench.records import Record, Results, key_of
from qjax.cli.tables import show
from qjax.models.kv_cache import CODED

HELP = "measure how fast models write text, each scheme beside the dense model"

COLUMNS = (
    "model", "scheme", "backend", "cache", "gpus", "batch", "prompt", "tok/s", "of dense", "step us", "bandwidth",
    "first token ms", "x in 8 bits", "weights GB", "in use GB", "peak GB",
)  # fmt: skip
NOTES = (
    "tok/s: of all rows together, greedy, without the host; bandwidth: what a step must read over its time, of this "
    "machine's copy;",
    "first token: prompts read as the scheme says; x in 8 bits: with that (generate(prompt_activations='8bit'));",
    "in use: weights and cache, of all devices together; peak: on one device, while prompts are read or tokens written",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument(
        "--models",
        metavar="M,...",
        default="llama-2-7b",
        help=f"{', '.join(GEOMETRIES)}, or folders; default: %(default)s",
    )
    parser.add_argument("--schemes", metavar="S,...", default="w4a16,w8a16,fp8", help="default: %(default)s")
    parser.add_argument("--backend", default="auto", help="default: %(default)s")
    parser.add_argument(
        "--cache", choices=("dense", *CODED), default="dense", help="of past tokens; default: %(default)s"
    )
    parser.add_argument("--batches", metavar="B,...", default="1,16,64", help="rows; default: %(default)s")
    parser.add_argument("--prompts", metavar="T,...", default="512", help="tokens of each prompt; default: %(default)s")
    parser.add_argument("--gpus", type=int, default=1, help="cut the model over so many; default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens a row and run; default: %(default)s")
    parser.add_argument("--alone", action="store_true", help="without the dense model beside, which may not fit")
    parser.add_argument("--explain", action="store_true", help="where the time of a step goes, and what bounds it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens a second by scheme as a PNG")


def run(args: argparse.Namespace, results: Results) -> None:
    """Measures, and prints what was asked for, also what `results` had before."""
    sizes = [cases.parse_rows(args.batches), cases.parse_rows(args.prompts)]
    (backend,) = cases.parse_backends(args.backend)
    models = [name.strip() for name in args.models.split(",")]
    for name in models:
        check_name(name)
    schemes, cache = cases.parse_schemes(args.schemes), None if args.cache == "dense" else args.cache
    wanted = decode_cases(models, schemes, *sizes, backend=backend, gpus=args.gpus, cache=cache)
    wanted = [case for case in wanted if case.scheme is not None or not args.alone]
    bench_decode(wanted, results, steps=args.steps, runs=RUNS, budget=args.limit, report=_tell)
    keys = {case.key for case in wanted}
    records = [record for record in results if key_of(record) in keys]
    notes = [*NOTES, *(f"not measured: {one['model']} {one['scheme']}: {one['error']}" for one in results.failures)]
    machine = results.machine
    title = f"{machine['device']}: {machine['bandwidth'] / 1e9:.0f} GB/s copied, jax {machine['jax']}"
    show(COLUMNS, map(_cells, records), title=title, right=COLUMNS[4:], notes=notes)
    if args.explain:
        for record in records:
            _explain(record)
    if args.plot is not None:
        _plot(args.plot, records, machine["device"])


def _tell(record: Record) -> None:
    """One record, to somebody who waits."""
    if sys.stderr.isatty():
        print(*(cell for cell in _cells(record) if cell is not None), sep="  ", file=sys.stderr, flush=True)


def _cells(record: Record) -> tuple[Any, ...]:
    return (
        record["model"],
        record["scheme"],
        record["backend"],
        record["cache"],
        record["gpus"],
        record["batch"],
        record["prompt"],
        f"{record['tok_s']:.1f}",
        None if record["speedup"] is None else f"{record['speedup']:.2f}x",
        f"{record['step_us']:.0f}",
        f"{record['share_of_bandwidth']:.0%}",
        f"{record['ttft_ms']:.1f}",
        f"{record['ttft_8bit_ms']:.1f}" if record.get("ttft_8bit_ms") else None,
        f"{record['weight_bytes'] / 1e9:.2f}",
        f"{(record['weight_bytes'] + record['cache_bytes']) / 1e9:.2f}",
        f"{record['peak_bytes'] / 1e9:.2f}",
    )


def _explain(record: Record) -> None:
    """A table of one step, and what bounds it."""
    title = f"{record['model']} {record['scheme']}, batch {record['batch']}: a step of {record['step_us']:.0f} us"
    if not record["kernels"]:
        print(f"{title}: {bound_of(record)}; no profiler here tells kernels apart")
        return
    rows = [
        (name, f"{n:.4g}", f"{us:.1f}", f"{share:.1%}")
        for name, n, us, share in breakdown(record["kernels"], record["step_us"])
    ]
    show(
        ("kernel", "launches", "us", "share"), rows, title=title, right=("launches", "us", "share"),
        notes=(bound_of(record),),
    )  # fmt: skip


def _plot(path: Path, records: Sequence[Record], device: str) -> None:
    from qjax.bench.plot import plot_tokens

    path.parent.mkdir(parents=True, exist_ok=True)
    plot_tokens(records, title=f"tokens a second on {device}").savefig(path, dpi=150)
