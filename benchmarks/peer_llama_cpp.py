"""How fast are llama.cpp's products on a CPU beside ours? y[1, N] = x[1, K] @ w of its Q4_0 and Q8_0, one process.

    python -m benchmarks.peer_llama_cpp GGML --threads 2 --note "what else ran"     adds to results/peer-llama-cpp.json

GGML is a folder with libggml-base.so and libggml-cpu.so, built from the sources that the sdist of llama-cpp-python
brings, for this machine and without OpenMP:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp/ggml && touch ggml.pc.in
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DGGML_CCACHE=OFF \\
          -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
    cmake --build build --target ggml-cpu                                     GGML is build/src

Their graph of products and our programs (benchmarks/cpu.py) take turns, all with x in float32 and weights that rotate
through more than the cache holds; their pool of threads is paused meanwhile, and woken before the clock starts. Both
are 64 products long, less than a token of a decoder: to start a program from Python takes 0.2 to 0.5 ms. They make
int8 of x in groups of 32 (Q8_0) in every product, so that `w4a8_int8:group_size=32` is what Q4_0 compares with. Q4_0 is
measured as files have it and repacked, as llama.cpp does when it loads a model. `speedup` is over their fastest product
of the same bits.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cpu import CACHE, RESULTS, quantized
from qjax.bench.machine import processor, revision
from qjax.bench.operands import random_array
from xla_ffi.cpu import library

SCHEMES = {"w4a8_int8:group_size=32": 4, "w4a16:group_size=32": 4, "w8a8_int8": 8, "w8a16": 8}  # and their bits
GROUP = 32
PRODUCTS = 64  # of a graph or program
TYPES = {"Q4_0": (2, 16), "Q8_0": (8, 32)}  # ggml's number of the type, and bytes of codes in a group
FLOAT32 = 0
MOST_WRONG = 0.02  # relative to a float64 product of the dequantized weight


class _InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The two libraries: all arguments are integers of 64 bits and pointers, and so is what is returned."""

    def __init__(self, folder: Path) -> None:
        names = "ggml-base", "ggml-cpu"
        self._libraries = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in names]

    def __call__(self, name: str, *args: Any, returns: Any = ctypes.c_void_p) -> Any:
        """Calls a function by its name."""
        function = next(getattr(one, name) for one in self._libraries if hasattr(one, name))
        function.restype = returns
        return function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in args))

    def context(self) -> int:
        """A new one, for tensors whose memory is allotted later."""
        return self("ggml_init", _InitParams(2**20, None, True))

    def repacking(self) -> int:
        """The type of buffers that change the order of what is put into them."""
        find = self(
            "ggml_backend_reg_get_proc_address", self("ggml_backend_cpu_reg"), b"ggml_backend_dev_get_extra_bufts"
        )
        found = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(find)
        types = found(ctypes.c_void_p(self("ggml_backend_reg_dev_get", self("ggml_backend_cpu_reg"), 0)))
        names = {}
        for i in range(8):
            if not types[i]:
                break
            names[self("ggml_backend_buft_name", types[i], returns=ctypes.c_char_p)] = types[i]
        return names[b"CPU_REPACK"]


def random_blocks(kind: str, n: int, k: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A weight as ggml holds it, and as floats `[N, K]`: a group is a float16 scale, then its codes."""
    size = TYPES[kind][1]
    blocks = np.zeros((n, k // GROUP), [("scale", "<f2"), ("codes", "u1", size)])
    blocks["scale"] = (0.5 + random.random(blocks.shape)) * k**-0.5 / (4.6 if kind == "Q4_0" else 74)
    blocks["codes"] = random.integers(0, 256, (*blocks.shape, size), np.uint8)
    codes = blocks["codes"]
    if kind == "Q4_0":  # the low nibbles are the first half of the group
        values = np.concatenate([codes & 15, codes >> 4], -1).astype(np.float32) - 8
    else:
        values = codes.view(np.int8).astype(np.float32)
    return blocks, (values * blocks["scale"][..., None].astype(np.float32)).reshape(n, k)


class Peer:
    """A graph of products of one type, each by another weight."""

    def __init__(self, ggml: Ggml, kind: str, repacked: bool, n: int, k: int, threads: int) -> None:
        self.name, self.kernel = f"llama.cpp {kind}" + (", repacked" if repacked else ""), "ggml"
        self.wall: list[float] = []
        self.busy: list[float] = []
        self._ggml = ggml
        self._backend = ggml("ggml_backend_cpu_init")
        params = ctypes.create_string_buffer(4096)  # more than the structure has, whatever the version
        ggml("ggml_threadpool_params_init", params, threads)
        self._pool = ggml("ggml_threadpool_new", params)
        ggml("ggml_backend_cpu_set_n_threads", self._backend, threads)
        ggml("ggml_backend_cpu_set_threadpool", self._backend, self._pool)
        blocks, values = random_blocks(kind, n, k, np.random.default_rng(0))
        self.products, copies = PRODUCTS, -(-CACHE // blocks.nbytes)
        plain = ggml("ggml_backend_get_default_buffer_type", self._backend)
        weights, rest = ggml.context(), ggml.context()
        ws = [ggml("ggml_new_tensor_2d", weights, TYPES[kind][0], k, n) for _ in range(copies)]
        x = ggml("ggml_new_tensor_2d", rest, FLOAT32, k, 1)
        self._graph = ggml("ggml_new_graph", rest)
        ys = [ggml("ggml_mul_mat", rest, ws[i % copies], x) for i in range(self.products)]
        for y in ys:
            ggml("ggml_build_forward_expand", self._graph, y)
        ggml("ggml_backend_alloc_ctx_tensors_from_buft", weights, ggml.repacking() if repacked else plain)
        ggml("ggml_backend_alloc_ctx_tensors_from_buft", rest, plain)
        for w in ws:
            ggml("ggml_backend_tensor_set", w, blocks.ctypes, 0, blocks.nbytes)
        at = np.random.default_rng(1).standard_normal(k, np.float32)
        ggml("ggml_backend_tensor_set", x, at.ctypes, 0, at.nbytes)
        self.call(None)
        self.wall, self.busy = [], []
        y, exact = np.zeros(n, np.float32), values.astype(np.float64) @ at
        ggml("ggml_backend_tensor_get", ys[-1], y.ctypes, 0, y.nbytes)
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        if not error < MOST_WRONG:
            raise ArithmeticError(f"{self.name} is wrong at {n} x {k}: relative error {error:.3g}")

    def call(self, _: Any) -> None:
        """One graph, timed."""
        self._ggml("ggml_threadpool_resume", self._pool)
        busy, wall = time.process_time(), time.perf_counter()
        status = self._ggml("ggml_backend_graph_compute", self._backend, self._graph, returns=ctypes.c_int32)
        self.wall.append((time.perf_counter() - wall) * 1e6 / self.products)
        self.busy.append((time.process_time() - busy) * 1e6 / self.products)
        self._ggml("ggml_threadpool_pause", self._pool)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")


def measure(ggml: Ggml, n: int, k: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one size: all in turns for `seconds`; `speedup` is over the peer's product of the same bits."""
    x = random_array(jax.random.key(1), (1, k), jnp.float32)
    theirs = [Peer(ggml, *form, n, k, threads) for form in (("Q4_0", False), ("Q4_0", True), ("Q8_0", False))]
    found = [*theirs, *(quantized(text, 1, n, k, PRODUCTS) for text in SCHEMES)]
    for c in found:
        c.call(x)
        c.wall.clear(), c.busy.clear()
    started = time.perf_counter()
    while len(found[-1].wall) < 9 or time.perf_counter() - started < seconds:
        for c in found:
            c.call(x)
    best = {4: min(theirs[:2], key=_median), 8: theirs[2]}
    peers = [best[bits] for bits in (4, 4, 8, *SCHEMES.values())]
    return [
        {
            "m": 1, "n": n, "k": k, "name": c.name, "kernel": c.kernel, "programs": len(c.wall), "products": c.products,
            "us": round(_median(c), 1), "us_p10": round(float(np.percentile(c.wall, 10)), 1),
            "cpu_us": round(statistics.median(c.busy), 1), "cpu_us_p10": round(float(np.percentile(c.busy, 10)), 1),
            "speedup": round(_median(peer) / _median(c), 3),
            "speedup_cpu": round(statistics.median(peer.busy) / statistics.median(c.busy), 3),
        }
        for c, peer in zip(found, peers, strict=True)
    ]  # fmt: skip


def _median(candidate: Any) -> float:
    return statistics.median(candidate.wall)


def main() -> None:
    """Measures and adds to the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ggml", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="NxK")
    parser.add_argument("--seconds", type=float, default=20, help="of turns for each size")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    os.environ["PJRT_NPROC"] = str(args.threads)  # read when XLA's client starts, which is below
    ggml = Ggml(args.ggml)
    run = {
        "processor": processor(), "threads": args.threads, "instructions": library.int8_instructions()[0],
        "ggml": ggml("ggml_version", returns=ctypes.c_char_p).decode(), "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__, "revision": revision(), "note": args.note, "records": [],
    }  # fmt: skip
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for record in measure(ggml, n, k, args.threads, args.seconds):
            run["records"].append(record)
            print(args.threads, record, flush=True)
    path = RESULTS / "peer-llama-cpp.json"
    document = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    document["runs"].append(run)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
