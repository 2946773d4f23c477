"""`qjax devices`: the capability table, the device at hand, and which backends are here, or why not."""

import argparse
from collections.abc import Iterator

import numpy as np

import qjax
from qjax import devices
from qjax.cli.tables import show
from qjax.devices import Device
from qjax.dispatch.backends import BACKENDS
from qjax.dispatch.choose import possible, refusal
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import ROUTES

HELP = "list the capability table, this machine's device and the backends that run on it"

# Heading -> format; a tensor core takes both FP8 types and both FP6 types, or none.
FORMATS = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "tf32": "tf32",
    "fp8": "e4m3",
    "int8": "int8",
    "int4": "int4",
    "fp6": "e3m2",
    "fp4": "e2m1",
}
SIZES = ("GB/s", "GiB", "SMs", "L2 MiB", "smem KiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--sources."""
    parser.add_argument("--sources", action="store_true", help="say where each row's figures are from")


def run(args: argparse.Namespace) -> None:
    """Prints both tables."""
    here = devices.current()
    known = list(devices.TABLE) if here in devices.TABLE else [*devices.TABLE, here]
    columns = ("", "device", "cc", *FORMATS, "2:4", *SIZES)
    notes = ["> this machine's; rates are dense, in 10^12 operations a second; - is not taken by the tensor cores"]
    if args.sources:
        notes += [f"{row.name}: {row.source}" for row in known]
    cells = [(">" if row == here else "", *_cells(row)) for row in known]
    show(columns, cells, title="devices", right=columns[2:], notes=notes)
    print()
    show(("backend", "here", "what it is"), _backends(here), title=f"backends on {here}")


def _cells(row: Device) -> Iterator[str]:
    yield row.name
    yield f"{row.cc / 10:.1f}" if row.cc else "-"
    for name in FORMATS.values():
        yield f"{row.rate(name) / 1e12:.0f}" if row.takes(name) else "-"
    yield "yes" if row.shared.sparse else "-"
    yield f"{row.bandwidth / 1e9:.0f}"
    yield f"{row.memory / 2**30:.0f}"
    yield str(row.sms)
    yield f"{row.l2 / 2**20:g}"
    yield f"{row.shared.smem_block / 2**10:g}"


def _backends(here: Device) -> Iterator[tuple[str, str, str]]:
    """Each backend, "yes" or why it cannot run here, and what it is."""
    able = possible(here)
    sample = Problem(m=1, n=4096, k=4096, scheme=qjax.W4A16(), x_dtype=np.dtype(devices.compute_dtype(here)))
    for backend in BACKENDS.values():
        reasons = (refusal(route, sample, here) for route in ROUTES if route.backend == backend.name)
        why = next((reason for reason in reasons if reason), "it has no kernels")
        yield backend.name, "yes" if backend.name in able else f"no: {why}", backend.about
