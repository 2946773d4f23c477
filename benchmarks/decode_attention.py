"""What does attention of one new token a row take? Rows of a Llama's layer over caches of 16 and 8 bits, on a GPU.

Each case runs with the tile that the kernel picks, and by tensor cores where it picks lanes. Calls run one after
another in one program, over caches that together exceed the L2; times are the profiler's, of the kernel and of what
joins shares. Prints a row at a time and writes `results/attention-<device>.json`; `floor_us` is what the cache's bytes
take at the copy bandwidth.

    python benchmarks/decode_attention.py
    python benchmarks/decode_attention.py --only "7B 64 int8" --tiles '[{"block": 64, "shares": 1, "warps": 2, ...}]'
"""

import argparse
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from accuracy import ROOT, environment

from pallas_kernels.triton.attention_plan import Tile, tile_for
from pallas_kernels.triton.decode_attention import decode_attention
from qjax import devices
from qjax.bench.machine import copy_bandwidth
from qjax.bench.timing import kernels_of
from qjax.dispatch.tuning import file_name

CAPACITY, POSITION, HEAD_DIM = 576, 511, 128
HEADS = {"7B": (32, 32), "8B": (32, 8), "70B": (64, 8)}  # of queries, of keys and values
ROWS = (1, 4, 16, 64)
KINDS = ("bfloat16", "int8", "float8_e4m3fn")
CACHES_BYTES = 10**9  # together, of one case
MOST_CACHES = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's attention: whose heads, how many rows, what the cache holds."""

    model: str
    rows: int
    kind: str

    @property
    def cache(self) -> tuple[int, int, int, int]:
        """The shape of keys, and of values."""
        return self.rows, HEADS[self.model][1], CAPACITY, HEAD_DIM

    @property
    def nbytes(self) -> int:
        """What a call has to read."""
        rows, kv_heads, _, head_dim = self.cache
        scale = 0 if self.kind == "bfloat16" else 4
        return 2 * rows * kv_heads * POSITION * (head_dim * jnp.dtype(self.kind).itemsize + scale)


def caches_of(case: Case, count: int) -> list[tuple[jax.Array, ...]]:
    """So many of random keys and values, with scales where they are codes."""

    @jax.jit
    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        keys, values = (jax.random.normal(k, case.cache) for k in jax.random.split(key))
        if case.kind == "bfloat16":
            return keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
        ones = jnp.full(case.cache[:3], 1 / 32, jnp.float32)
        return (32 * keys).astype(case.kind), (32 * values).astype(case.kind), ones, ones

    return [one(key) for key in jax.random.split(jax.random.key(0), count)]


def measured(case: Case, tile: Tile, sms: int, smem: int) -> dict[str, float]:
    """Microseconds of a call by kernel."""
    (heads, kv_heads), count = HEADS[case.model], max(2, min(MOST_CACHES, CACHES_BYTES // case.nbytes))
    one = jax.jit(functools.partial(
        decode_attention, scale=HEAD_DIM**-0.5, sms=sms, smem=smem, config=dataclasses.asdict(tile)
    ))  # fmt: skip

    def chain(row: jax.Array, angles: jax.Array, positions: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        after = []
        for cache in caches:
            out, *left = one(row, angles, angles, positions, *cache)
            row = jnp.concatenate([out, row[:, out.shape[1] :]], axis=1)
            after.append(tuple(left))
        return row, after

    run = jax.jit(chain, donate_argnums=3)
    row = jax.random.normal(jax.random.key(1), (case.rows, (heads + 2 * kv_heads) * HEAD_DIM)).astype(jnp.bfloat16)
    token = row, jnp.ones((case.rows, HEAD_DIM // 2)), jnp.full(case.rows, POSITION, jnp.int32)
    _, caches = jax.block_until_ready(run(*token, caches_of(case, count)))
    return {k["name"]: k["us"] for k in kernels_of(lambda: run(*token, caches), count) if k["name"].startswith("qjax")}


def main() -> None:
    """Runs every case, prints as it goes, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of cases, as in 'int8'")
    parser.add_argument("--tiles", type=json.loads, default=[], help="JSON: others to try, fields of `Tile`")
    args = parser.parse_args()
    device = devices.current()
    if device.platform != "gpu":
        raise SystemExit(f"this is {device}: the kernel is for NVIDIA GPUs")
    bandwidth = copy_bandwidth(2**30)
    out = ROOT / "benchmarks" / "results" / file_name(f"attention-{device.name}")
    rows: list[dict[str, Any]] = []
    for case in (Case(model, count, kind) for kind in KINDS for model in HEADS for count in ROWS):
        if args.only not in f"{case.model} {case.rows} {case.kind}":
            continue
        shape = HEADS[case.model][0], case.cache, "bfloat16", case.kind, device.sms, device.shared.smem_block
        own, dots = tile_for(*shape), tile_for(*shape, lanes=False)
        for tile in dict.fromkeys([own, dots, *(Tile(**fields) for fields in args.tiles)]):
            kernels = measured(case, tile, device.sms, device.shared.smem_block)
            floor = case.nbytes / bandwidth * 1e6
            rows.append(dataclasses.asdict(case) | dict(tile=dataclasses.asdict(tile), us=kernels, floor_us=floor))
            print(json.dumps(rows[-1]), flush=True)
        if not args.only:
            out.write_text(json.dumps({**environment(), "bandwidth": bandwidth, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
