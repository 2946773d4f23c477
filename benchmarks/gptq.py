"""What does calibrating one large layer take? GPTQ on a 4096 x 4096 layer that 128 x 2048 tokens enter.

Times the sums over tokens (float32, 16 windows at a time) and the rounding, each after a first run that compiles, and
says what memory the device held at most. Prints a row at a time and writes `results/gptq-<device>.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from accuracy import ROOT, environment

import qjax
from qjax import devices
from qjax.calibration import parse_recipe
from qjax.calibration.layer import Layer, quantize_layer
from qjax.calibration.moments import Statistics, add, measure
from qjax.dispatch.tuning import file_name

RECIPES = ("gptq:clip=false", "gptq:order=static,clip=false", "gptq", "gptq:order=static,passes=4")
SCHEME = "w4a16"
BATCH = 16  # windows


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median, the first run left out."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def batch_of(number: int, window: int, k: int) -> jax.Array:
    """bfloat16 `[BATCH, window, K]` with columns of different sizes."""
    key = jax.random.key(number)
    return (jax.random.normal(key, (BATCH, window, k)) * jnp.linspace(0.1, 3, k)).astype(jnp.bfloat16)


def measured(count: int, window: int, k: int) -> Statistics:
    """Of so many batches."""
    total = None
    for number in range(count):
        one = measure(batch_of(number, window, k), None, jnp.int32(number), (2,), ())
        total = one if total is None else add(total, one)
    assert total is not None, count
    return total


def main() -> None:
    """Runs every row, prints as it goes, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="N and K")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=2048, help="tokens of one")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    k, count = args.size, args.windows // BATCH
    if count < 1:
        parser.error(f"--windows {args.windows}: expected at least {BATCH}, which are measured at a time")
    weight = jax.random.normal(jax.random.key(-1), (k, k)) * 0.02
    out = ROOT / "benchmarks" / "results" / file_name(f"gptq-{devices.current().name}")
    rows: list[dict[str, Any]] = []

    def record(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        document = {**environment(), **vars(args), "scheme": SCHEME, "rows": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")

    drawn = seconds_of(lambda: [batch_of(number, args.window, k).block_until_ready() for number in range(count)], 1)
    statistics_s = seconds_of(lambda: measured(count, args.window, k), args.repeats) - drawn
    found = measured(count, args.window, k)
    layer = Layer("layer", weight, qjax.parse_scheme(SCHEME))
    for recipe in RECIPES:
        taken = seconds_of(lambda recipe=recipe: quantize_layer(layer, found, parse_recipe(recipe)), args.repeats)
        memory = jax.devices()[0].memory_stats() or {}
        record(
            recipe=recipe,
            statistics_s=statistics_s,
            rounding_s=taken,
            peak_bytes=memory.get("peak_bytes_in_use"),
        )


if __name__ == "__main__":
    main()
