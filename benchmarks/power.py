"""How fast does a chip run, and on how much power, while products of many rows follow one another?

Each scheme's product runs back to back for three seconds over eight weights, in a loop in one jit, while nvidia-smi is
asked every 50 ms. Prints a line a scheme and writes `results/power-<device>.json`: wall time a product, of the first
run after a pause and of the later half of runs; kernels by the profiler, after a pause (`cold`) and at the end (`hot`);
samples of clocks.sm in MHz, power.draw in W, clocks_event_reasons.active (4: SW power cap).

    python -m benchmarks.power --backend cublaslt --schemes w8a8_fp8 w8a8_fp8:granularity=block,activation=block
"""

import argparse
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax import devices
from qjax.bench.cases import parse_schemes
from qjax.bench.machine import revision
from qjax.bench.operands import random_array, random_weight
from qjax.bench.timing import kernels_of
from qjax.dispatch.tuning import file_name

ROWS, WEIGHTS, TURNS, SECONDS = 2048, 8, 10, 3
_ASK = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active", "--format=csv,noheader,nounits"]


def chain_of(scheme: str, n: int, k: int, backend: str | None) -> Callable[[], Any]:
    """Runs `TURNS * WEIGHTS` products, each of x that the one before has touched."""
    keys = [jax.random.key(i) for i in range(WEIGHTS)]
    if scheme == "dense":
        weights: list[Any] = [random_array(key, (k, n), jnp.bfloat16) for key in keys]
    else:
        weights = [random_weight(key, parse_schemes(scheme)[0], n, k) for key in keys]
    x = random_array(jax.random.key(WEIGHTS), (ROWS, k), jnp.bfloat16)

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> jax.Array:
        def turn(_: int, x: jax.Array) -> jax.Array:
            for w in weights:
                y = x @ w if scheme == "dense" else qjax.matmul(x, w, backend=backend)
                x = jax.lax.dynamic_update_slice(x, y[:1, :1] * 0 + x[:1, :1], (0, 0))
            return x

        return jax.lax.fori_loop(0, TURNS, turn, x)

    return lambda: jax.block_until_ready(chain(x, weights))


def sampled(run: Callable[[], Any]) -> tuple[list[float], list[list[float]]]:
    """Wall times a product in microseconds, and the samples meanwhile."""
    done, samples, times = threading.Event(), [], []

    def ask() -> None:
        while not done.wait(0.05):
            said = subprocess.run([*_ASK, "-i", "0"], capture_output=True, text=True, check=True).stdout
            clock, power, reasons = said.split(",")
            samples.append([float(clock), float(power), int(reasons, 16)])

    asking = threading.Thread(target=ask)
    asking.start()
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        before = time.perf_counter()
        run()
        times.append((time.perf_counter() - before) / TURNS / WEIGHTS * 1e6)
    done.set()
    asking.join()
    return times, samples


def measured(scheme: str, n: int, k: int, backend: str | None) -> dict[str, Any]:
    """One scheme's record."""
    run = chain_of(scheme, n, k, backend)
    run()
    time.sleep(0.5)
    cold = kernels_of(run, TURNS * WEIGHTS)[:3]
    times, samples = sampled(run)
    hot = kernels_of(run, TURNS * WEIGHTS)[:3]
    late = float(np.median(times[len(times) // 2 :]))
    return dict(scheme=scheme, n=n, k=k, first_us=times[0], hot_us=late, cold=cold, hot=hot, samples=samples)


def main() -> None:
    """Runs every scheme, prints as it goes, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schemes", nargs="+", default=["w8a8_fp8", "w8a8_int8"], help="beside `dense`, which is first"
    )
    parser.add_argument("--backend", help="as qjax.matmul has it; default: what dispatch chooses")
    parser.add_argument("--shape", default="22016x4096", help="NxK")
    parser.add_argument("--commit", default=revision(), help="what the results are of")
    parser.add_argument("--json", type=Path, help="where results go")
    args = parser.parse_args()
    device = devices.current()
    if device.platform != "gpu":
        raise SystemExit(f"this is {device}: nvidia-smi has nothing to say of it")
    n, k = map(int, args.shape.split("x"))
    records = []
    for scheme in ["dense", *args.schemes]:
        records.append(measured(scheme, n, k, args.backend))
        half = records[-1]["samples"][len(records[-1]["samples"]) // 2 :]
        clock, power = (sorted(s[i] for s in half)[len(half) // 2] for i in (0, 1))
        kernel = records[-1]["hot"][0]
        print(f"{scheme}: {records[-1]['hot_us']:.1f} us, {clock:.0f} MHz, {power:.0f} W; {kernel['name']}", flush=True)
    found = {"machine": {"gpu": device.name, "jax": jax.__version__}, "commit": args.commit, "backend": args.backend}
    file = args.json or Path(__file__).parent / "results" / file_name(f"power-{device.name}")
    file.write_text(json.dumps({**found, "records": records}) + "\n")


if __name__ == "__main__":
    main()
