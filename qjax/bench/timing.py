"""How long a compiled program takes a call: by the clock on the wall, and by the GPU's own account of its kernels.

The second is what the profiler (CUPTI on an NVIDIA GPU) saw: the time in which at least one kernel ran, without the
gaps between kernels that the first includes.
"""

import glob
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from qjax.bench.programs import Program

PAUSE = 1e-3  # seconds between traced programs: the clocks of host and GPU agree to far less


class Timing(NamedTuple):
    """Microseconds a call: the median over runs, and the extremes."""

    us: float
    us_min: float
    us_max: float


def time_program(program: Program, runs: int) -> Timing:
    """Runs once unmeasured, then `runs` times."""
    jax.block_until_ready(program.run())
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(program.run())
        found.append((time.perf_counter() - started) / program.calls * 1e6)
    return Timing(statistics.median(found), min(found), max(found))


def warm_up(program: Program, seconds: float = 0.2) -> None:
    """Runs until the device has left the low clocks that it idles at while we compile."""
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        jax.block_until_ready(program.run())


def kernel_times(programs: Sequence[Program]) -> list[float | None]:
    """Microseconds a call in which the GPU ran kernels, for each program; None where the profiler saw none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _trace(programs, folder)
        except RuntimeError as error:  # of the profiler's: another trace is open, no permission
            logging.warning("kernel times are left out: %s", error)
            return [None] * len(programs)
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        if not files:
            logging.warning("kernel times are left out: the profiler wrote no trace")
            return [None] * len(programs)
        busy = busy_times(jax.profiler.ProfileData.from_file(files[0]), [_label(i) for i in range(len(programs))])
    return [b / p.calls / 1e3 if b else None for b, p in zip(busy, programs, strict=True)]


def _label(index: int) -> str:
    return f"qjax_bench_{index}"


def _trace(programs: Sequence[Program], folder: str) -> None:
    """One run of each program under the profiler, each inside an annotation of its own."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        for index, program in enumerate(programs):
            time.sleep(PAUSE)
            with jax.profiler.TraceAnnotation(_label(index)):
                jax.block_until_ready(program.run())
                time.sleep(PAUSE)


def busy_times(profile: Any, labels: Sequence[str]) -> list[float]:
    """Nanoseconds in which a GPU was busy inside each annotation of a trace.

    Args:
      profile: a `jax.profiler.ProfileData`.
      labels: names of annotations on the host.
    """
    windows = dict.fromkeys(labels, (0.0, 0.0))
    kernels: list[tuple[float, float]] = []
    for plane in profile.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                kernels += ((e.start_ns, e.start_ns + e.duration_ns) for e in line.events)
            elif plane.name.startswith("/host"):
                windows |= {e.name: (e.start_ns, e.start_ns + e.duration_ns) for e in line.events if e.name in windows}
    kernels.sort()
    return [
        _covered((start, stop) for start, stop in kernels if first <= start < last) for first, last in windows.values()
    ]


def kernels_of(run: Callable[[], Any], calls: int) -> list[dict[str, Any]]:
    """What the kernels of one run take, those of one name together: name, launches and microseconds of a call.

    Names lose the numbers that XLA ends them with. A kernel that begins before the one before it has ended
    (`pallas_kernels.mosaic.launches`) counts from that one's end. Empty where the profiler saw no kernel of the first
    GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        if not files:
            logging.warning("kernels are left out: the profiler wrote no trace")
            return []
        return count_kernels(jax.profiler.ProfileData.from_file(files[0]), calls)


def count_kernels(profile: Any, calls: int) -> list[dict[str, Any]]:
    """The same of a `jax.profiler.ProfileData`, the longest first."""
    planes = sorted((p for p in profile.planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)[:1]
    streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    spent: dict[str, list[float]] = {}
    for line in streams:
        reached = float("-inf")
        for event in sorted(line.events, key=lambda event: event.start_ns):
            stop = event.start_ns + event.duration_ns
            alone = max(0.0, stop - max(event.start_ns, reached))
            spent.setdefault(re.sub(r"(_\d+)+$", "", event.name), []).append(alone)
            reached = max(reached, stop)
    found = [{"name": n, "launches": len(t) / calls, "us": sum(t) / calls / 1e3} for n, t in spent.items()]
    return sorted(found, key=lambda kernel: -kernel["us"])


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
