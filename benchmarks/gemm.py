"""How fast is a product with quantized weights? Every scheme, size and backend, beside bfloat16 in the same run.

    python benchmarks/gemm.py --commit REVISION            writes results/gemm-<device>.json, the most important first
    python benchmarks/gemm.py --draw results/gemm-h200.json    draws a file, on any machine: results/gemm-h200.png
    python benchmarks/gemm.py --rehearse                   a few small products on any machine, none of them kept

Stops in time (`--limit`), and goes on where the file stopped when it is run again. docs/benchmarks.md says how it is
measured.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from qjax import devices
from qjax.bench.cases import (
    BACKENDS,
    ROWS,
    SCHEMES,
    SHAPES,
    Case,
    cases_of,
    parse_backends,
    parse_rows,
    parse_schemes,
    parse_shapes,
)
from qjax.bench.gemm import bench_gemm
from qjax.bench.machine import describe_machine, revision
from qjax.bench.predict import predict
from qjax.bench.programs import FULL, QUICK, Effort
from qjax.bench.records import Record, Results, key_of, read
from qjax.dispatch.tuning import file_name

RESULTS = Path(__file__).parent / "results"

MAIN_SCHEMES = "w4a16,w8a16,nf4,w8a8_int8"
MAIN_SHAPES = "22016x4096,8192x8192,4096x4096"
MAIN_ROWS = "1,16,64,2048"
MORE_SCHEMES = "w4a16:group_size=32,w4a16:symmetric=false,w4a16:group_size=-1,fp4"

# Schemes, rows and shapes, the most important first; what a later stage has in common with an earlier one is done.
STAGES = (
    ("w4a16", ROWS, MAIN_SHAPES),
    (MAIN_SCHEMES, MAIN_ROWS, MAIN_SHAPES),
    (SCHEMES, MAIN_ROWS, MAIN_SHAPES),
    (MAIN_SCHEMES, ROWS, SHAPES),
    (SCHEMES, ROWS, SHAPES),
    (MORE_SCHEMES, MAIN_ROWS, MAIN_SHAPES),
)
REHEARSAL = (("w4a16,w8a8_int8", "1,130", "512x256"),)
SHORTEST = Effort(seconds=0.001, most_calls=8, runs=2, weights=2)


def stages(of: Sequence[tuple[str, str, str]] = STAGES) -> list[Case]:
    """The cases of all stages, each once."""
    backends = parse_backends(BACKENDS)
    found: dict[Case, None] = {}
    for schemes, rows, shapes in of:
        found |= dict.fromkeys(cases_of(parse_schemes(schemes), backends, parse_rows(rows), parse_shapes(shapes)))
    return list(found)


def tell(record: Record) -> None:
    """A line for each record as it comes."""
    size = f"{record['n']}x{record['k']} m={record['m']}"
    kernel = "-" if record["kernel_us"] is None else f"{record['kernel_us']:.1f}"
    print(
        f"{size:20} {record['scheme']:28} {record['backend']:8} {record['route']:24} "
        f"{record['us']:9.1f} us ({kernel} in kernels)  bf16 {record['bf16_us']:8.1f} us  {record['speedup']:5.2f}x  "
        f"error {record['err_ratio']:.2f}",
        flush=True,
    )


def draw(*paths: Path) -> Path:
    """The main schemes and shapes of files of one device, as dispatch chooses kernels, and what the roofline expects of
    them; what two files have is that of the first, whose name the picture gets."""
    from qjax.bench.plot import plot_speedups

    documents = [read(path) for path in paths]
    device = devices.find_device(documents[0]["machine"]["device"])
    schemes, shapes = parse_schemes(MAIN_SCHEMES), parse_shapes(MAIN_SHAPES)
    names = {str(scheme) for scheme in schemes}
    found: dict[Any, dict[str, Any]] = {}
    for record in (record for document in documents for record in document["records"]):
        if record["backend"] == "auto" and record["scheme"] in names and (record["n"], record["k"]) in shapes:
            found.setdefault(key_of(record), record)
    records = list(found.values())
    measured = {record["scheme"] for record in records}
    drawn = [scheme for scheme in schemes if str(scheme) in measured]
    expected = [predict(device, s, m, n, k) for n, k in shapes for s in drawn for m in parse_rows(ROWS)]
    out = paths[0].with_suffix(".png")
    plot_speedups(records, expected, title=f"y = x @ w on {device.name}").savefig(out, dpi=150)
    return out


def measure(cases: list[Case], path: Path, effort: Effort, limit: float, commit: str | None) -> None:
    """Adds to a file what it lacks of the cases, as far as the seconds allow."""
    started = time.monotonic()
    results = Results(path, describe_machine(), commit or revision())
    print(results.header, flush=True)
    bench_gemm(cases, results, effort=effort, budget=limit - (time.monotonic() - started), report=tell)
    missing = [case for case in cases if case.key not in results]
    failed = len(results.failures)
    print(f"{path}: {len(cases) - len(missing)} of {len(cases)} records, {failed} that a backend cannot make")


def main() -> None:
    """Measures, or draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="default: results/gemm-<device>.json")
    parser.add_argument("--limit", type=float, default=450.0, help="seconds; default: %(default)g")
    parser.add_argument("--commit", help="the revision to record; default: git's")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--rehearse", action="store_true", help="small products, to see that it runs")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="FILE", help="draw FILEs instead of measuring")
    args = parser.parse_args()
    if args.draw is not None:
        print(draw(*args.draw))
        return
    logging.set_verbosity(logging.INFO)
    if args.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            measure(stages(REHEARSAL), Path(folder) / "gemm.json", SHORTEST, args.limit, args.commit)
        return
    path = args.json or RESULTS / file_name(f"gemm-{devices.current().name}")
    measure(stages(), path, QUICK if args.quick else FULL, args.limit, args.commit)


if __name__ == "__main__":
    main()
