"""`qjax bench`: speed on this machine, each number beside the dense one in the same run."""

import argparse
from pathlib import Path

from qjax.bench.machine import describe_machine, revision
from qjax.bench.records import Results
from qjax.cli import bench_decode, bench_gemm

HELP = "measure products (gemm) or whole models (decode)"

OPERATIONS = {"gemm": bench_gemm, "decode": bench_decode}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and where to leave it."""
    operations = parser.add_subparsers(title="operations", dest="operation", metavar="OPERATION", required=True)
    for name, operation in OPERATIONS.items():
        sub = operations.add_parser(name, help=operation.HELP, description=operation.HELP)
        operation.add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write records, and go on where FILE stopped")
        sub.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing new after that")
        sub.add_argument("--commit", help="the revision to record; default: git's")


def run(args: argparse.Namespace) -> None:
    """Measures, and prints what was asked for, also what FILE had before."""
    results = Results(args.json, describe_machine(), args.commit or revision())
    OPERATIONS[args.operation].run(args, results)
