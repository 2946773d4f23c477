"""Runs every kernel on the GPU at hand and writes what came out: numerics, bounds, rows, CUDA graphs, sanitizers.

    python tests/gpu/run.py                                   into benchmarks/results/test-gpu-<gpu>.json
    python tests/gpu/run.py --out FILE --limit 300 --seed 7   elsewhere, within 300 seconds, the cases of seed 7
    python tests/gpu/run.py --only nf4                        the cases with this in their names; writes nothing
    python tests/gpu/run.py --rehearse                        a few small products by the reference, on any machine

It needs jax, numpy, ml_dtypes and absl; no pytest. The exit code is 1 if anything failed, and 0 where there is no GPU.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # sanitizers run while this process waits
    os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"  # else a warning of the compiler costs a second
    os.environ["JAX_PLATFORMS"] = "cpu" if "--rehearse" in sys.argv else os.environ.get("JAX_PLATFORMS", "")

import jax
from gpu import layer_checks
from gpu.attention_checks import CASES as ATTENTIONS
from gpu.attention_checks import check_attention, claimed
from gpu.kernel_checks import Case, check, compile_case
from gpu.kernel_selection import rehearsed, selected, with_graph
from gpu.results import Results
from gpu.sanitizer import Sanitizer
from products import gpu_routes

from qjax import devices
from qjax.bench.machine import revision
from qjax.dispatch.choose import lacking

ROOT = Path(__file__).parents[2]
_THREADS = min(16, os.cpu_count() or 1)
_SANITIZER_LIMIT = 300.0  # seconds, for each of two at once


def run_cases(cases: list[Case], graphs: set[Case], deadline: float, results: Results) -> None:
    """Compiles all cases in threads, and runs one after another as they are ready; skips those past the deadline."""
    with ThreadPoolExecutor(_THREADS) as pool:
        compiled = {pool.submit(compile_case, case, case in graphs): case for case in cases}
        with contextlib.suppress(TimeoutError):
            for done, future in enumerate(as_completed(dict(compiled), max(0.0, deadline - time.monotonic()))):
                case = compiled.pop(future)
                try:
                    wrong, made = check(case, future.result())
                except Exception as error:  # whatever it is: this case failed, the others go on
                    wrong, made = [f"{type(error).__name__}: {error}"], set()
                results.add(str(case), wrong, made)
                if done % 25 == 24:
                    print(f"{done + 1} of {len(cases)}, {len(results.failures)} failed", flush=True)
        for future, case in compiled.items():
            future.cancel()
            results.skip(str(case), "no time left")


def run_checks[C](
    cases: list[C], wrong_with: Callable[[C], list[str]], name: str, deadline: float, results: Results
) -> None:
    """The same for kernels that are no products of dispatch, each with a check of its own."""
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = {case: pool.submit(wrong_with, case) for case in cases}
        for case, future in checked.items():
            if time.monotonic() > deadline:
                future.cancel()
                results.skip(str(case), "no time left")
                continue
            try:
                wrong = future.result()
            except Exception as error:  # as above
                wrong = [f"{type(error).__name__}: {error}"]
            results.add(str(case), wrong, [name])


def report(tool: Sanitizer, results: Results) -> None:
    """Adds what a sanitizer found."""
    wrong, skipped = tool.outcome(_SANITIZER_LIMIT)
    if skipped is None:
        results.add(f"compute-sanitizer {tool.tool}", wrong, [tool.tool])
    else:
        results.skip(f"compute-sanitizer {tool.tool}", skipped)


def main() -> int:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=420, help="seconds after which no case is begun")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--revision", help="of the code, where git does not know it")
    parser.add_argument("--rehearse", action="store_true", help="the checks themselves, on a CPU")
    given = parser.parse_args()
    if not given.rehearse and jax.default_backend() != "gpu":
        print(f"tests/gpu is skipped: no GPU here, JAX runs on {jax.default_backend()}")
        return 0
    absent = {route.name: reason for route in gpu_routes() if (reason := lacking(route)) is not None}
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}", flush=True)
    deadline, results, device = time.monotonic() + given.limit, Results(given.seed, absent), devices.current()
    cases = rehearsed(given.seed) if given.rehearse else selected(gpu_routes(), given.seed)
    cases = [case for case in cases if given.only in str(case)]
    print(f"{len(cases)} cases on {device}, seed {given.seed}", flush=True)
    whole = not (given.rehearse or given.only)
    attentions = [case for case in ATTENTIONS if given.only in str(case) and claimed(case)]
    layers = [case for case in layer_checks.CASES if given.only in str(case) and layer_checks.claimed()]
    run_checks(attentions, check_attention, "attention", deadline, results)
    run_checks(layers, layer_checks.check_layer, "layer", deadline, results)
    run_cases(cases, set() if given.rehearse else with_graph(cases), deadline, results)
    # After the cases, whose compiling times kernels on the same GPU.
    for tool in [Sanitizer(tool, given.seed) for tool in ("memcheck", "racecheck")] if whole else []:
        report(tool, results)
    document = results.document(given.revision or revision())
    gpu = device.name.lower().replace(" ", "-")
    out = given.out or (ROOT / "benchmarks" / "results" / f"test-gpu-{gpu}.json" if whole else None)
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({name: value for name, value in document.items() if name != "failures"}, indent=1))
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
