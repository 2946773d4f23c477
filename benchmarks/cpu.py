"""How fast are quantized products on a CPU, beside XLA's float32 product of the same shape and the same threads?

    python -m benchmarks.cpu --threads 2 --note "what else ran"     adds to results/cpu-<processor>.json

A program is eight products and more one after another, each of whose x waits for the last y, as in a decoder: a call
from Python takes 40 to 140 us whatever it runs. Programs of all candidates take turns (float32 in both layouts, every
scheme), so that whatever else the machine does falls on all alike, and dequantize-then-dot follows; weights rotate
through more than the cache holds. Of the times of a product the median and the 10th percentile are kept, by the clock
on the wall and by the processor time, which other programs lengthen far less.
"""

import argparse
import json
import os
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
from qjax.bench.machine import processor, revision
from qjax.bench.operands import random_array, random_weight
from qjax.dispatch.choose import choose
from qjax.kernel_call import problem_of
from xla_ffi.cpu import library

RESULTS = Path(__file__).parent / "results"
SCHEMES = "w4a16,w8a16,w4a16:group_size=32,w4a16:symmetric=false,nf4,mxfp4,nvfp4,fp8,w3a16,w2a16,w4a8_int8,w8a8_int8"
SLOW = "dequantize, dot"  # timed after the others: the memory that it gives back would be on the next one's account
CACHE = 2**26  # bytes: what the weights of one candidate exceed together
PRODUCTS = 8  # of a program, and as many as there are weights

Product = Callable[[jax.Array, Any], jax.Array]


@dataclass
class Candidate:
    """A program of products, and the weights that they take in turn."""

    name: str
    kernel: str
    product: Product
    weights: list[Any]
    products: int = 0
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.products = self.products or max(PRODUCTS, len(self.weights))
        self.run = jax.jit(self._chain)

    def _chain(self, x: jax.Array, weights: list[Any]) -> jax.Array:
        for i in range(self.products):
            # All of y, of which XLA would compute no more than is read.
            y = jax.lax.optimization_barrier(self.product(x, weights[i % len(weights)]))
            x = x + 0 * y[:, :1]
        return y

    def call(self, x: jax.Array) -> None:
        """One program, timed."""
        busy, wall = time.process_time(), time.perf_counter()
        self.run(x, self.weights).block_until_ready()
        self.wall.append((time.perf_counter() - wall) * 1e6 / self.products)
        self.busy.append((time.process_time() - busy) * 1e6 / self.products)


def copies(make: Callable[[jax.Array], Any]) -> list[Any]:
    """As many weights as exceed the cache together, each from a key of its own."""
    first = make(jax.random.key(0))
    count = -(-CACHE // first.nbytes)
    return [first, *(make(jax.random.key(i)) for i in range(1, count))]


def quantized(text: str, m: int, n: int, k: int, products: int = 0) -> Candidate:
    """A scheme as dispatch runs it: `w4a16`, or `w4a16@bfloat16` for x, and y, of that type."""
    name, _, x_dtype = text.partition("@")
    scheme, dtype = qjax.parse_scheme(name), jnp.dtype(x_dtype or "float32")
    weights = copies(lambda key: random_weight(key, scheme, n, k))
    inside = jnp.int8 if scheme.activation else dtype
    kernel = choose(problem_of(weights[0], m=m, x_dtype=inside, out_dtype=dtype)).route.name
    return Candidate(text, kernel, lambda x, w: qjax.matmul(x.astype(dtype), w), weights, products)


def candidates(m: int, n: int, k: int, schemes: list[str]) -> list[Candidate]:
    """Float32 in both layouts, the reference on int4, and every scheme as dispatch runs it."""
    dense = copies(lambda key: random_array(key, (n, k), jnp.float32))
    found = [quantized(text, m, n, k) for text in schemes]
    return [
        Candidate("float32 [N, K]", "xla", lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), dense),
        Candidate("float32 [K, N]", "xla", jnp.dot, [w.T.copy() for w in dense]),
        Candidate(SLOW, "xla", lambda x, w: x @ w.dequantize(jnp.float32), found[0].weights[:1], products=1),
        *found,
    ]


def measure(m: int, n: int, k: int, schemes: list[str], seconds: float) -> list[dict[str, Any]]:
    """Records of one size: programs in turns for `seconds`, 15 of each at least; then `SLOW`."""
    x = random_array(jax.random.key(1), (m, k), jnp.float32)
    found = candidates(m, n, k, schemes)
    for c in found:
        c.run(x, c.weights).block_until_ready()
    started, turn = time.perf_counter(), 0
    while turn < 15 or time.perf_counter() - started < seconds:
        for c in found:
            if c.name != SLOW:
                c.call(x)
        turn += 1
    for c in found:
        for _ in range(7 if c.name == SLOW else 0):
            c.call(x)
    base = [min(statistics.median(getattr(c, of)) for c in found[:2]) for of in ("wall", "busy")]
    return [
        {
            "m": m, "n": n, "k": k, "name": c.name, "kernel": c.kernel, "programs": len(c.wall), "products": c.products,
            "us": round(statistics.median(c.wall), 1), "us_p10": round(float(np.percentile(c.wall, 10)), 1),
            "cpu_us": round(statistics.median(c.busy), 1), "cpu_us_p10": round(float(np.percentile(c.busy, 10)), 1),
            "speedup": round(base[0] / statistics.median(c.wall), 3),
            "speedup_cpu": round(base[1] / statistics.median(c.busy), 3),
        }
        for c in found
    ]  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The last run of each number of threads as Markdown: microseconds of a product, and the ratio to float32."""
    runs = {run["threads"]: run for run in document["runs"]}
    found: dict[str, dict[tuple[int, ...], str]] = {}
    for threads, run in sorted(runs.items()):
        for r in run["records"]:
            said = f"{r['us'] / 1e3:.2f} ms, {r['speedup']:.2f}x"
            found.setdefault(r["name"], {})[r["n"], r["k"], r["m"], threads] = said
    sizes = sorted({size for row in found.values() for size in row})
    heads = [f"{n}x{k}, M = {m}, {t} thread{'s' * (t > 1)}" for n, k, m, t in sizes]
    lines = [["", *heads], ["---", *("--:" for _ in heads)]]
    lines += [[f"`{name}`", *(row.get(size, "-") for size in sizes)] for name, row in found.items()]
    last = document["runs"][-1]
    said = f"\n{last['instructions']}, jax {last['jax']}, revision {last['revision']}; {last['note']}.\n"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + said


def main() -> None:
    """Measures and adds to the processor's file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of XLA; all by default")
    parser.add_argument("--m", default="1,8")
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="NxK")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--seconds", type=float, default=20, help="of turns for each size")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    name = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    parser.add_argument("--json", type=Path, default=RESULTS / f"cpu-{name}.json", help="default: %(default)s")
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
    document = json.loads(args.json.read_text()) if args.json.is_file() else {"processor": processor(), "runs": []}
    document["runs"].append(run)
    args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
