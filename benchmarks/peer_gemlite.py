"""How fast is gemlite, Triton kernels of the torch world, beside ours? int4 in groups of 128, bfloat16, one process.

    PYTHONPATH=.:GEMLITE python benchmarks/peer_gemlite.py --commit REVISION --json FILE

needs torch, triton and gemlite (pure Python; GEMLITE is where its sdist was unpacked) beside JAX on a GPU. FILE gets
our records, as `benchmarks/gemm.py` makes them, and gemlite's of the same sizes with the backend `gemlite`: its calls
run in a CUDA graph over as many weights as ours rotate through, after its own tuning, the median of seven runs by CUDA
events. Their `bf16_us` is that of our records. It stops in time (`--limit`) and goes on where FILE stopped.
"""

import argparse
import importlib.metadata
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory too

import torch
from gemlite.helper import A16W4_HQQ_INT

from qjax import devices
from qjax.bench.cases import Case, cases_of, parse_rows, parse_shapes
from qjax.bench.gemm import bench_gemm
from qjax.bench.machine import describe_machine, revision
from qjax.bench.programs import rotation
from qjax.bench.records import Record, Results
from qjax.schemes import W4A16

GROUP = 128
BACKEND = "gemlite"
SECONDS = 0.02  # of a run
RUNS = 7
MOST_WRONG = 0.02  # relative to a float32 product of the dequantized weight


def random_layer(n: int, k: int, generator: torch.Generator) -> tuple[Any, torch.Tensor]:
    """A layer of gemlite's, and its weight `[N, K]` in float32."""
    options: dict[str, Any] = dict(device="cuda", generator=generator)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, **options)
    scale = ((0.5 + torch.rand(n, k // GROUP, **options)) * k**-0.5 / 4.6).to(torch.bfloat16)
    zero = torch.full_like(scale, 8)
    layer = A16W4_HQQ_INT(device="cuda", dtype=torch.bfloat16).from_weights(codes, scale.view(-1, 1), zero.view(-1, 1))
    return layer, (codes.float() - 8) * scale.float().repeat_interleave(GROUP, 1)


def measure(case: Case) -> dict[str, float]:
    """Microseconds of a call, and its error."""
    generator = torch.Generator("cuda").manual_seed(0)
    count = rotation(case.n * case.k // 2, devices.current())
    layer, weight = random_layer(case.n, case.k, generator)
    layers = [layer, *(random_layer(case.n, case.k, generator)[0] for _ in range(count - 1))]
    xs = torch.randn(count, case.m, case.k, device="cuda", generator=generator).to(torch.bfloat16)
    exact = xs[0].float() @ weight.T
    error = (torch.linalg.norm(layers[0](xs[0]).float() - exact) / torch.linalg.norm(exact)).item()
    if not error < MOST_WRONG:
        raise ArithmeticError(f"{BACKEND} is wrong at {case.m} x {case.n} x {case.k}: relative error {error:.3g}")
    del weight
    for one, x in zip(layers, xs, strict=True):
        one(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one, x in zip(layers, xs, strict=True):
            one(x)
    rounds = max(1, round(SECONDS / (_milliseconds(graph, 3) * 1e-3)))
    times = [_milliseconds(graph, rounds) * 1e3 / count for _ in range(RUNS)]
    return {"us": statistics.median(times), "us_min": min(times), "us_max": max(times), "rel_err": error}


def _milliseconds(graph: Any, rounds: int) -> float:
    """Of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds


def beside(case: Case, ours: Record) -> Record:
    """gemlite's record of a size of which there is ours."""
    found = measure(case)
    return {
        "op": "gemm", "scheme": str(case.scheme), "backend": BACKEND, "m": case.m, "n": case.n, "k": case.k,
        "route": f"{BACKEND} {importlib.metadata.version('gemlite')}", "config": {}, **found, "kernel_us": None,
        "bf16_us": ours["bf16_us"], "speedup": ours["bf16_us"] / found["us"],
    }  # fmt: skip


def main() -> None:
    """Measures ours, then gemlite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", help="the revision to record; default: git's")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds; default: %(default)g")
    parser.add_argument("--shapes", default="22016x4096,8192x8192,4096x4096", help="default: %(default)s")
    parser.add_argument("--m", default="1,16,64,2048", help="default: %(default)s")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    until = time.monotonic() + args.limit
    results = Results(args.json, describe_machine(), args.commit or revision())
    cases = cases_of([W4A16(group_size=GROUP)], ["auto"], parse_rows(args.m), parse_shapes(args.shapes))
    bench_gemm(cases, results, budget=args.limit / 2)
    records = {(r["backend"], r["m"], r["n"], r["k"]): r for r in results}
    for case in cases:
        size = (case.m, case.n, case.k)
        ours = records.get(("auto", *size))
        if ours is None or (BACKEND, *size) in records or time.monotonic() > until:
            continue
        theirs = beside(case, ours)
        results.add([theirs])
        print(
            f"{case.n}x{case.k} m={case.m:<5} ours {ours['us']:8.1f} us, {ours['speedup']:5.2f}x ({ours['route']})   "
            f"{BACKEND} {theirs['us']:8.1f} us, {theirs['speedup']:5.2f}x, error {theirs['rel_err']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
