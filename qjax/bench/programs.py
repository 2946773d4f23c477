"""A product as a compiled program that runs it many times back to back, against weights that are not in the cache.

    round:  for each i:  x_i, w_i = barrier(x_i, w_i, after y_{i-1});  y_i = f(x_i, w_i)
            total += y_0[0, 0] + y_1[0, 0] + ...

Every pair (x_i, w_i) is another one: XLA merges products that share an operand and drops those it has seen. Barriers
keep it from lifting anything out of the loop, from computing the one element of y that is read, and, each waiting for
the product before, from merging neighbours into one kernel. Rounds are long, so that the few small kernels of the loop
itself hardly count.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.devices import Device
from qjax.errors import QJaxError


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
      seconds: length of a run by the estimate: 400 calls or more of a product up to 100 us.
      most_calls: of a run.
      runs: of a program, of which the median is reported.
      weights: products in a round where memory allows.
    """

    seconds: float = 0.04
    most_calls: int = 2000
    runs: int = 7
    weights: int = 32


FULL = Effort()
QUICK = Effort(seconds=0.01, most_calls=500, runs=3, weights=8)

Product = Callable[[Any, Any], jax.Array]


class Program(NamedTuple):
    """A compiled loop and what it runs on. `run` returns a sum that nothing is dead behind, and y of the first pair."""

    name: str
    compiled: Any
    xs: Sequence[Any]
    ws: Sequence[Any]
    calls: int

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Starts it; the results may not be there yet."""
        return self.compiled(self.xs, self.ws)


def rotation(weight_bytes: int, device: Device, effort: Effort = FULL) -> int:
    """How many weights to rotate through: past twice the L2, and `effort.weights` while they fit in memory easily."""
    past_cache = 2 * device.l2 // weight_bytes + 1
    roomy = min(effort.weights, device.memory // 32 // weight_bytes)
    return min(max(past_cache, roomy, 2), 2 * effort.weights)


def loop_of(product: Product, rounds: int) -> Callable[[Sequence[Any], Sequence[Any]], tuple[jax.Array, jax.Array]]:
    """The loop of the module's docstring, of `xs` and `ws`; returns its total, and y of the first pair."""

    def loop(xs: Sequence[Any], ws: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        def body(_: Any, total: jax.Array) -> jax.Array:
            ys: list[jax.Array] = []
            for x, w in zip(xs, ws, strict=True):
                x, w, _ = jax.lax.optimization_barrier((x, w, ys[-1] if ys else total))
                ys.append(product(x, w))
            return total + sum(y[0, 0].astype(jnp.float32) for y in jax.lax.optimization_barrier(ys))

        return jax.lax.fori_loop(0, rounds, body, jnp.float32(0)), product(xs[0], ws[0])

    return loop


def build(name: str, product: Product, xs: Sequence[Any], ws: Sequence[Any], seconds: float, effort: Effort) -> Program:
    """Compiles the loop of a product that is expected to take `seconds`, over equally many xs and ws."""
    calls = min(effort.most_calls, effort.seconds / seconds)
    rounds = max(1, math.ceil(calls / len(ws)))
    loop = loop_of(product, rounds)
    loop.__name__ = name  # a profiler shows it
    return Program(name, jax.jit(loop).lower(xs, ws).compile(), xs, ws, rounds * len(ws) + 1)


def build_all(builders: Sequence[Callable[[], Program]]) -> list[Program | Exception]:
    """Compiles in as many threads as there are cores; nothing is to be timed meanwhile.

    What does not compile is an exception in its place.
    """

    def attempt(builder: Callable[[], Program]) -> Program | Exception:
        try:
            return builder()
        except Exception as error:  # of XLA, Pallas, a kernel or ours: one product less, and the caller says why
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, builders))


def one_line(error: Exception) -> str:
    """The class and the beginning of the message: XLA's are pages long."""
    name = "" if isinstance(error, QJaxError) else f"{type(error).__name__}: "
    return (name + " ".join(str(error).split()))[:300]
