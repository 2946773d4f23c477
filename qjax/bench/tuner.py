"""`qjax tune`: measures the configurations of each kernel on the machine at hand, and writes the fastest to a table.

For every (shape, rows, scheme) and every route that can run it, those expected to be fast first: all configurations are
compiled, then each is timed shortly and the best few again with more runs. A winner must also be right. Kernels without
configurations are timed too: `choose` takes what measured fastest over what an estimate says.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from qjax import devices
from qjax.bench.exact import compare, rows_of
from qjax.bench.operands import Operands, product_of
from qjax.bench.programs import Effort, Program, build, build_all, one_line
from qjax.bench.timing import time_program, warm_up
from qjax.dispatch import roofline, tuning
from qjax.dispatch.choose import facts, load, refusal
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import ROUTES, Route
from qjax.dispatch.tuning import Entry
from qjax.errors import QJaxError
from qjax.kernel_call import run_route
from qjax.progress import track
from qjax.qtensor import QTensor
from qjax.quantize_call import quantized
from qjax.schemes import Scheme

TUNING = Effort(seconds=0.01, most_calls=1000, runs=9, weights=16)
SHORT_RUNS = 2
FINALISTS = 4
MOST_ERROR = 0.02  # relative: rounding y to bfloat16 is 0.0017

Config = dict[str, Any]


class Task(NamedTuple):
    """One kernel on one product, to be tuned. `m` is a bucket of the table."""

    route: Route
    scheme: Scheme
    m: int
    n: int
    k: int

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What its entry is found by."""
        return self.route.name, str(self.scheme), self.n, self.k, self.m


def tasks_of(
    schemes: Iterable[Scheme],
    rows: Iterable[int],
    shapes: Iterable[tuple[int, int]],
    names: Sequence[str] | None = None,
    routes: tuple[Route, ...] = ROUTES,
) -> list[Task]:
    """Every product with every route that can run it, or with those named.

    Raises:
      QJaxError: a name that no route has.
    """
    unknown = set(names or ()) - {route.name for route in routes}
    if unknown:
        raise QJaxError(f"unknown route {min(unknown)!r}; known: {', '.join(route.name for route in routes)}")
    device, schemes = devices.current(), list(schemes)
    buckets = list(dict.fromkeys(tuning.bucket(m) for m in rows))
    found = []
    for n, k in shapes:
        for m in buckets:
            for scheme in schemes:
                problem = product_of(scheme, m, n, k, devices.compute_dtype(device))
                able = [r for r in routes if names is None or r.name in names]
                able = [r for r in able if refusal(r, problem, device) is None]
                found += [Task(r, scheme, m, n, k) for r in sorted(able, key=lambda r: _estimate(r, problem))]
    return found


def _estimate(route: Route, problem: Problem) -> float:
    device = devices.current()
    return roofline.estimate(problem, device, roofline.efficiency(route.name, problem, device)).seconds


def tune(
    tasks: Sequence[Task],
    *,
    directory: Path | None = None,
    effort: Effort = TUNING,
    budget: float | None = None,
    most_configs: int | None = None,
    again: bool = False,
    report: Callable[[Entry], None] | None = None,
) -> int:
    """Tunes what the table in `directory` lacks, and writes each winner as soon as it is known.

    Args:
      tasks: in the order of their importance; those of one (n, k) that follow one another share weights.
      directory: of the table; the user's by default.
      effort: how often a finalist runs.
      budget: seconds after which no task is begun.
      most_configs: configurations tried of a kernel, spread evenly over its list; all by default.
      again: whether to measure what the table has, too.
      report: told of every entry.

    Returns:
      How many tasks were left for lack of time.
    """
    device, started = devices.current(), time.monotonic()
    done = set() if again else _written(device.name, directory)
    todo = [task for task in tasks if task.key not in done]
    operands: Operands | None = None
    for index, task in enumerate(track(todo, "tuning")):
        if budget is not None and time.monotonic() - started > budget:
            logging.warning("out of time: %d of %d are for another run", len(todo) - index, len(todo))
            return len(todo) - index
        if operands is None or (operands.n, operands.k) != (task.n, task.k):
            operands = Operands(task.n, task.k, effort)
        entry = tune_one(task, operands, most_configs)
        if entry is not None:
            tuning.write(device.name, [entry], directory)
            if report is not None:
                report(entry)
    return 0


def _written(device: str, directory: Path | None) -> set[tuple[Any, ...]]:
    """The keys in the table of `directory`; none where there is no table yet.

    Raises:
      QJaxError: a file that is no table, which writing would replace.
    """
    path = (directory or tuning.user_directory()) / tuning.file_name(device)
    if not path.is_file():
        return set()
    try:
        return {(*entry.key, entry.m) for entry in tuning.load(path, device)}
    except ValueError as error:
        raise QJaxError(f"{path}: is no tuning table for {device}: {error}; move it away") from error


def configs_of(task: Task, problem: Problem, most: int | None) -> list[Config]:
    """The kernel's own choice, then those it lists, at most `most` of them."""
    if task.route.is_reference:
        return [{}]
    device = devices.current()
    listed = load(task.route).configs(problem.m, problem.k, problem.n, **facts(problem, device))
    step = max(1.0, len(listed) / most) if most else 1.0
    return [{}, *(listed[int(i * step)] for i in range(int(len(listed) / step)))]


def tune_one(task: Task, operands: Operands, most_configs: int | None = None) -> Entry | None:
    """The fastest right configuration of one kernel; None, with a warning, where none is."""
    problem = product_of(task.scheme, task.m, task.n, task.k, operands.dtype)
    configs = configs_of(task, problem, most_configs)
    builders = [_builder(task, problem, config, operands) for config in configs]
    programs = build_all(builders)
    for first in [program for program in programs if isinstance(program, Program)][:1]:
        warm_up(first)
    timed: list[tuple[float, int, Program]] = []
    for index, program in enumerate(programs):
        try:
            if isinstance(program, Exception):
                raise program
            timed.append((time_program(program, SHORT_RUNS).us_min, index, program))
        except Exception as error:  # a configuration that does not compile or run cannot win
            logging.info("%s %s: %s", task.key, configs[index], one_line(error))
    finalists = sorted(timed)[:FINALISTS]
    again = sorted((time_program(p, operands.effort.runs).us, index, p) for _, index, p in finalists)
    for us, index, program in again:
        _, y = program.run()
        off = compare(y, rows_of(program.xs[0], program.ws[0]), operands.columns(task.scheme)).rel_err
        if off < MOST_ERROR:
            config = tuning.freeze(configs[index])
            return Entry(task.route.name, str(task.scheme), task.n, task.k, task.m, config, round(us, 3))
        logging.error("%s %s is wrong: relative error %g", task.key, configs[index], off)
    logging.warning("%s: none of %d configurations ran and was right", task.key, len(configs))
    return None


def _builder(task: Task, problem: Problem, config: Config, operands: Operands) -> Callable[[], Program]:
    def product(x: jax.Array, w: QTensor) -> jax.Array:
        return run_route(task.route, config, quantized(x, w.scheme.activation, w.act_scale, None), w, problem)

    ws = operands.weights(task.scheme)
    xs = operands.rows(task.m, len(ws))
    seconds = _estimate(task.route, problem)
    return functools.partial(build, task.route.name.replace(".", "_"), product, xs, ws, seconds, operands.effort)
