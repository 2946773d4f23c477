"""How fast are quantized products on a CPU, beside XLA's float32 product of the same shape and the same threads?

    python -m benchmarks.cpu --threads 2 --note "what else ran"     adds to results/cpu-<processor>.json

Calls of all candidates take turns (float32 in both layouts, every scheme), so that whatever else the machine does falls
on all alike, and dequantize-then-dot follows; weights rotate through more than the cache holds. Of the times of single
calls the median and the 10th percentile are kept, by the clock on the wall and by the process's processor time, which
other programs lengthen far less.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.bench.machine import revision
from qjax.bench.operands import random_array, random_weight
from qjax.dispatch.choose import choose
from qjax.kernel_call import problem_of
from xla_ffi.cpu import library

RESULTS = Path(__file__).parent / "results"
SCHEMES = "w4a16,w8a16,w4a16:group_size=32,w4a16:symmetric=false,nf4,mxfp4,nvfp4,fp8,w3a16,w2a16,w4a8_int8,w8a8_int8"
SLOW = "dequantize, dot"  # timed after the others: the memory that it gives back would be on the next one's account
CACHE = 2**26  # bytes: what the weights of one candidate exceed together


@dataclass
class Candidate:
    """A compiled product and the weights that it takes in turn."""

    name: str
    kernel: str
    run: Callable[..., jax.Array]
    weights: list[Any]
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def call(self, turn: int, x: jax.Array) -> None:
        """One call, timed."""
        w = self.weights[turn % len(self.weights)]
        busy, wall = time.process_time(), time.perf_counter()
        self.run(x, w).block_until_ready()
        self.wall.append((time.perf_counter() - wall) * 1e6)
        self.busy.append((time.process_time() - busy) * 1e6)


def _copies(make: Callable[[jax.Array], Any]) -> list[Any]:
    first = make(jax.random.key(0))
    count = -(-CACHE // first.nbytes)
    return [first, *(make(jax.random.key(i)) for i in range(1, count))]


def candidates(m: int, n: int, k: int, schemes: list[str]) -> list[Candidate]:
    """Float32 in both layouts, the reference on int4, and every scheme as dispatch runs it."""
    dense = _copies(lambda key: random_array(key, (n, k), jnp.float32))
    found = [
        Candidate(
            "float32 [N, K]", "xla", jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))), dense
        ),
        Candidate("float32 [K, N]", "xla", jax.jit(jnp.dot), [w.T.copy() for w in dense]),
    ]
    for text in schemes:
        scheme = qjax.parse_scheme(text)
        weights = _copies(lambda key, scheme=scheme: random_weight(key, scheme, n, k))
        if not found[2:]:
            found.append(Candidate(SLOW, "xla", jax.jit(lambda x, w: x @ w.dequantize(jnp.float32)), weights))
        inside = jnp.int8 if scheme.activation else jnp.float32
        kernel = choose(problem_of(weights[0], m=m, x_dtype=inside, out_dtype=jnp.float32)).route.name
        found.append(Candidate(text, kernel, jax.jit(qjax.matmul), weights))
    return found


def measure(m: int, n: int, k: int, schemes: list[str], seconds: float) -> list[dict[str, Any]]:
    """Records of one size: calls in turns for `seconds`, 15 of each at least; then `SLOW`."""
    x = random_array(jax.random.key(1), (m, k), jnp.float32)
    found = candidates(m, n, k, schemes)
    for c in found:
        c.run(x, c.weights[0]).block_until_ready()
    started, turn = time.perf_counter(), 0
    while turn < 15 or time.perf_counter() - started < seconds:
        for c in found:
            if c.name != SLOW:
                c.call(turn, x)
        turn += 1
    for c in found:
        for turn in range(7 if c.name == SLOW else 0):
            c.call(turn, x)
    base = [min(statistics.median(getattr(c, of)) for c in found[:2]) for of in ("wall", "busy")]
    return [
        {
            "m": m, "n": n, "k": k, "name": c.name, "kernel": c.kernel, "calls": len(c.wall),
            "us": round(statistics.median(c.wall), 1), "us_p10": round(float(np.percentile(c.wall, 10)), 1),
            "cpu_us": round(statistics.median(c.busy), 1), "cpu_us_p10": round(float(np.percentile(c.busy, 10)), 1),
            "speedup": round(base[0] / statistics.median(c.wall), 3),
            "speedup_cpu": round(base[1] / statistics.median(c.busy), 3),
        }
        for c in found
    ]  # fmt: skip


def processor() -> str:
    """What the processor calls itself."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def main() -> None:
    """Measures and adds to the processor's file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of XLA; all by default")
    parser.add_argument("--m", default="1,8")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="NxK")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--seconds", type=float, default=20, help="of turns for each size")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    os.environ["PJRT_NPROC"] = str(args.threads)  # read when XLA's client starts, which is below
    run = {
        "threads": args.threads, "instructions": library.instructions()[0], "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__, "revision": revision(), "note": args.note, "records": [],
    }  # fmt: skip
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, args.m.split(",")):
            for record in measure(m, n, k, args.schemes.split(","), args.seconds):
                run["records"].append(record)
                print(args.threads, record)
    path = RESULTS / f"cpu-{re.sub(r'[^a-z0-9]+', '-', processor().lower()).strip('-')}.json"
    document = json.loads(path.read_text()) if path.is_file() else {"processor": processor(), "runs": []}
    document["runs"].append(run)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
