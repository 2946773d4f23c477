"""Hammers products from several threads at once, on every GPU here, and compares all results bit for bit.

    python tests/gpu/hammer.py                      60 seconds; the last line is a summary as JSON
    python tests/gpu/hammer.py --seconds 20 --threads 4
    python tests/gpu/hammer.py --rehearse           the reference on a CPU for a second

The products are cuBLASLt's in each of its modes, and one of each of our own families of kernels. Each runs in these
forms, and `--threads` threads a device call them, each with two calls on their way:

    alone      one product on one device
    streams    two products on CUDA streams of their own
    branches   two products as branches of one CUDA graph
    devices    one executable over all devices, where there are several, each with operands of its own

The first result of every executable is held to float64, by the checks of `kernel_checks`; every later one has to have
the first one's bits. What the library keeps is shared by all: a call site's plan, a device's handle. The exit code is 1
if anything differed.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu" if "--rehearse" in sys.argv else os.environ.get("JAX_PLATFORMS", "")

import jax
import jax.numpy as jnp
import numpy as np
from gpu.kernel_checks import Case, accuracy, bits, function_of
from jax.experimental.compute_on import compute_on
from jax.sharding import NamedSharding, PartitionSpec
from products import Operands, Product

from qjax import devices
from qjax.activations import Rows
from qjax.dispatch.choose import choose
from qjax.errors import BackendError
from qjax.kernel_call import run_route
from qjax.qtensor import QTensor
from qjax.quantize_call import quantized

# backend, scheme, (M, K, N): every mode of the library, aligned and with an odd M, and our own kernels beside it.
PRODUCTS = (
    ("cublaslt", "w8a8_fp8:granularity=tensor,mode=static", (64, 2048, 2048)),
    ("cublaslt", "w8a8_fp8", (64, 2048, 2048)),
    ("cublaslt", "w8a8_fp8", (17, 1040, 264)),
    ("cublaslt", "w8a8_fp8:granularity=block,activation=block", (64, 2048, 2048)),
    ("cublaslt", "w8a8_fp8:granularity=block,activation=block", (17, 1040, 264)),
    ("cublaslt", "w8a8_int8", (64, 2048, 2048)),
    ("cublaslt", "w8a16", (64, 2048, 2048)),
    ("triton", "w4a16", (16, 2048, 2048)),
    ("mosaic", "w4a16", (16, 2048, 2048)),
)
REHEARSED = (("xla", "w4a16", (5, 256, 64)), ("xla", "w8a8_int8", (5, 256, 64)))
_SEED = 11
_SETS = 2  # of operands: a result that belongs to another call shows


@dataclasses.dataclass(frozen=True)
class Job:
    """An executable, what it is called with, and the bits of its first results.

    `run` returns results of all products that it makes, and x as it was quantized, each with an axis for the products.
    """

    name: str
    run: Callable[[Any], tuple[jax.Array, Any]]
    given: Sequence[Any]
    first: Sequence[np.ndarray]


def cases_of(products: Iterable[tuple[str, str, tuple[int, int, int]]]) -> tuple[list[Case], list[str]]:
    """The kernels that do the products here, and why some are not done."""
    found, absent = [], []
    for backend, scheme, (m, k, n) in products:
        product = Product(scheme, m, k, n)
        try:
            found.append(Case(choose(product.problem, devices.current(), backend).route, product, _SEED))
        except BackendError as error:
            absent.append(str(error))
    return found, absent


def operands(case: Case, index: int, position: int) -> Operands:
    """The set `index` of operands, for the product at a position of an executable."""
    return case.operands(index + position * _SETS)


def _job(
    name: str, case: Case, run: Callable[[Any], Any], given: Sequence[Any], options: Any = None
) -> tuple[Job, list[str]]:
    """A job after its first calls, and what is wrong with them; `options` are XLA's."""
    run, wrong, first = jax.jit(run, compiler_options=options), [], []
    for index, arguments in enumerate(given):
        y, rows = jax.tree.map(np.asarray, run(arguments))
        for position in range(len(y)):
            here = jax.tree.map(lambda a, at=position: a[at], (y, rows))
            wrong += [f"{name}: {said}" for said in accuracy(case, operands(case, index, position), *here)]
        first.append(bits(y))
    return Job(name, run, given, first), wrong


def alone(case: Case, device: Any) -> tuple[Job, list[str]]:
    """A product on one device."""
    run = function_of(case)
    given = [jax.device_put(operands(case, i, 0), device) for i in range(_SETS)]
    return _job(f"{case} on {device.id}", case, lambda o: jax.tree.map(lambda a: a[None], run(o)), given)


def _pairs(case: Case, device: Any) -> list[Any]:
    return [jax.device_put([operands(case, i, at) for at in range(2)], device) for i in range(_SETS)]


def on_streams(case: Case, device: Any) -> tuple[Job, list[str]]:
    """The kernel twice, on two streams of one executable."""
    p, space = case.product, jax.memory.Space.Device
    activation = p.weight.scheme.activation

    def kernel(rows: Rows, w: QTensor) -> jax.Array:
        return run_route(case.route, {}, rows, dataclasses.replace(w, act_scale=None), p.problem)

    def both(pair: list[Operands]) -> Any:
        scales = [None if o.w.act_scale is None else o.w.act_scale[..., None, None] for o in pair]
        rows = [quantized(o.x, activation, scale, None) for o, scale in zip(pair, scales, strict=True)]
        ys = [
            compute_on(kernel, compute_type=f"gpu_stream:{i + 1}", out_memory_spaces=space)(rows[i], pair[i].w)
            for i in range(2)
        ]
        joined = jax.tree.map(lambda *a: jnp.stack(a), *rows)
        return jnp.stack(ys), None if activation is None else joined

    outside = {"xla_gpu_graph_min_graph_size": 1000}  # of a CUDA graph
    return _job(f"{case} on streams of {device.id}", case, both, _pairs(case, device), outside)


def as_branches(case: Case, device: Any) -> tuple[Job, list[str]]:
    """The product twice, as branches of one CUDA graph."""
    run = function_of(case)

    def both(pair: list[Operands]) -> Any:
        return jax.tree.map(lambda *a: jnp.stack(a), *map(run, pair))

    options = {"xla_gpu_graph_min_graph_size": 1, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    return _job(f"{case} in branches on {device.id}", case, both, _pairs(case, device), options)


def on_devices(case: Case) -> tuple[Job, list[str]]:
    """One executable over all devices, each with a product of its own."""
    run, count = function_of(case), len(jax.devices())
    mesh, spec = jax.make_mesh((count,), ("d",)), PartitionSpec("d")

    def one(o: Operands) -> Any:
        return jax.tree.map(lambda a: a[None], run(jax.tree.map(lambda a: a[0], o)))

    def stacked(index: int) -> Any:
        each = [operands(case, index, at) for at in range(count)]
        return jax.device_put(jax.tree.map(lambda *a: np.stack(a), *each), NamedSharding(mesh, spec))

    every = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return _job(f"{case} on all of {count}", case, every, [stacked(i) for i in range(_SETS)])


def hammer(jobs: Sequence[Job], start: int, seconds: float) -> tuple[Counter[str], Counter[str]]:
    """Calls the jobs in turn, two on their way at any time: how often each ran, and how often it differed."""
    runs, wrong, until = Counter[str](), Counter[str](), time.monotonic() + seconds
    for i in itertools.count(start):
        if time.monotonic() > until:
            return runs, wrong
        pair = [(jobs[(i + ahead * (1 + start)) % len(jobs)], (i // len(jobs) + ahead) % _SETS) for ahead in range(2)]
        on_their_way = [job.run(job.given[index]) for job, index in pair]
        for (job, index), (y, _) in zip(pair, on_their_way, strict=True):
            runs[job.name] += 1
            wrong[job.name] += bool((bits(y) != job.first[index]).any())


def _attempt(make: functools.partial[tuple[Job, list[str]]]) -> tuple[Job | None, list[str]]:
    """A job; or why there is none, whatever it is: the others go on."""
    try:
        return make()
    except Exception as error:
        return None, [f"{make.func.__name__} {' '.join(map(str, make.args))}: {type(error).__name__}: {error}"]


def hammered(products: Iterable[Any], seconds: float, threads: int) -> dict[str, Any]:
    """The summary of a run: `wrong` says in words what was."""
    cases, absent = cases_of(products)
    here, forms = jax.devices(), {alone: cases}
    if jax.default_backend() == "gpu":
        # XLA does not compile the padding of scales, a call inside of a call, on a stream of its own.
        forms |= {on_streams: [c for c in cases if c.product.m % 4 == 0], as_branches: cases}
    makers = [[functools.partial(form, case, d) for form, some in forms.items() for case in some] for d in here]
    makers += [[functools.partial(on_devices, case) for case in cases]] if len(here) > 1 else []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        made = [list(pool.map(_attempt, some)) for some in makers]
    wrong = [text for some in made for _, texts in some for text in texts]
    lists = [[job for job, _ in some if job is not None] for some in made]
    calls = [jobs for jobs in lists[: len(here)] for _ in range(threads)] + lists[len(here) :]
    runs, differing = Counter[str](), Counter[str]()
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(hammer, jobs, start, seconds) for start, jobs in enumerate(calls)]:
            try:
                counted = future.result()
            except Exception as error:  # whatever it is: the run has failed, and says so
                wrong.append(f"{type(error).__name__}: {error}")
                continue
            runs, differing = runs + counted[0], differing + counted[1]
    wrong += [f"{name}: {count} of {runs[name]} results differ" for name, count in differing.items()]
    return {
        "gpu": here[0].device_kind,
        "devices": len(here),
        "threads": len(calls),
        "seconds": seconds,
        "products": list(map(str, cases)),
        "absent": absent,
        "executables": len(runs),
        "runs": runs.total(),
        "fewest_runs": min(runs.values(), default=0),
        "wrong": [text[:500] for text in wrong[:20]],
    }


def main() -> int:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2, help="for each device; default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="the reference, on a CPU")
    given = parser.parse_args()
    if not given.rehearse and jax.default_backend() != "gpu":
        print(f"nothing is hammered: no GPU here, JAX runs on {jax.default_backend()}")
        return 0
    summary = hammered(REHEARSED if given.rehearse else PRODUCTS, given.seconds, given.threads)
    print(json.dumps(summary))
    return 1 if summary["wrong"] or not summary["runs"] else 0


if __name__ == "__main__":
    sys.exit(main())
