"""`qjax bench gemm`: the public product on many sizes, schemes and backends, each beside bfloat16 in the same run.

Sizes are taken one (N, K) at a time, since weights are shared by all that is measured with them. Of each, a batch of
numbers of rows is compiled, dense products first and by themselves since XLA picks their algorithms by timing them.
Only then everything is timed, one after another:

    dense  entrant  entrant  ...  dense again        `bf16_us` is the faster time of the faster layout

Records are written as soon as their number of rows is done, and once more with kernel times when the batch is.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import logging

import qjax
from qjax.bench.cases import Case
from qjax.bench.exact import compare, rows_of
from qjax.bench.operands import Operands, product_of
from qjax.bench.programs import FULL, Effort, Program, build, build_all, one_line
from qjax.bench.records import KEYS, Record, Results
from qjax.bench.timing import Timing, kernel_times, time_program, warm_up
from qjax.dispatch import roofline
from qjax.dispatch.choose import Choice, choose
from qjax.dispatch.problem import Problem
from qjax.errors import BackendError


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One kernel on one product, and the cases it answers: `auto` and a backend's name may come to the same."""

    cases: tuple[Case, ...]
    problem: Problem
    choice: Choice


class Heat(NamedTuple):
    """All that is measured at one (m, n, k), side by side."""

    m: int
    entrants: list[Entrant]


class Measured(NamedTuple):
    """A record, and the programs that it is of: the entrant's, and the dense one beside it."""

    record: Record
    program: Program
    dense: Program


def bench_gemm(
    cases: Iterable[Case],
    results: Results,
    *,
    effort: Effort = FULL,
    budget: float | None = None,
    report: Callable[[Record], None] | None = None,
) -> bool:
    """Measures the cases that `results` lacks, and adds their records.

    Args:
      cases: the most important first; those of one (n, k) that follow one another share their weights.
      results: where records go, and failures, with the machine's measured ceilings.
      effort: how often everything runs.
      budget: seconds after which nothing new is begun.
      report: told of every record once it is complete.

    Returns:
      Whether nothing was left out for lack of time.

    Raises:
      BackendError: an unknown backend.
      QuantizeError: a scheme whose groups do not divide K.
    """
    started = time.monotonic()
    todo = [case for case in cases if case.key not in results]
    for (n, k), of_shape in itertools.groupby(todo, lambda case: (case.n, case.k)):
        operands = Operands(n, k, effort)
        for batch in _batches(_heats(list(of_shape), operands, results)):
            if budget is not None and time.monotonic() - started > budget:
                logging.warning("out of time: another run with the same file goes on with the rest")
                return False
            for measured in _run_batch(batch, operands, results):
                if report is not None:
                    report(measured.record)
    return True


def _heats(cases: list[Case], operands: Operands, results: Results) -> Iterator[Heat]:
    """Cases by m, in the order of first appearance."""
    for m in dict.fromkeys(case.m for case in cases):
        entrants = _entrants([case for case in cases if case.m == m], operands, results)
        if entrants:
            yield Heat(m, entrants)


def _batches(heats: Iterable[Heat]) -> Iterator[list[Heat]]:
    """Heats in their order, together as many programs as keep every core compiling."""
    batch: list[Heat] = []
    for heat in heats:
        batch.append(heat)
        if sum(len(h.entrants) for h in batch) >= 4 * (os.cpu_count() or 1):
            yield batch
            batch = []
    if batch:
        yield batch


def _entrants(cases: list[Case], operands: Operands, results: Results) -> list[Entrant]:
    """What runs for cases of one size; where a backend cannot, that is noted."""
    found: dict[Any, Entrant] = {}
    for case in cases:
        problem = product_of(case.scheme, case.m, case.n, case.k, operands.dtype)
        try:
            choice = choose(problem, operands.device, case.backend)
        except BackendError as error:
            results.fail(case.key, one_line(error))
            continue
        key = (case.scheme, choice.route, choice.config)
        others = found[key].cases if key in found else ()
        found[key] = Entrant((*others, case), problem, choice)
    return list(found.values())


def _run_batch(batch: list[Heat], operands: Operands, results: Results) -> list[Measured]:
    """Compiles everything, then times everything, then asks the profiler."""
    layouts = build_all([builder for heat in batch for builder in _dense_builders(heat, operands)])
    dense = _require(layouts)
    compiled = iter(build_all([_builder(entrant, operands) for heat in batch for entrant in heat.entrants]))
    measured: list[Measured] = []
    for heat, pair in zip(batch, itertools.batched(dense, 2), strict=True):
        programs = list(itertools.islice(compiled, len(heat.entrants)))
        found = _run_heat(heat, programs, pair, operands, results)
        results.add(one.record for one in found)
        measured += found
    if operands.device.platform == "gpu":
        _add_kernel_times(measured)
        results.add(one.record for one in measured)
    return measured


def _require(programs: Iterable[Program | Exception]) -> list[Program]:
    """Dense programs: without them there is nothing to compare with."""
    found = []
    for program in programs:
        if isinstance(program, Exception):
            raise program
        found.append(program)
    return found


def _dense_builders(heat: Heat, operands: Operands) -> Iterator[Callable[[], Program]]:
    """Of the dense product by either layout of the weight."""
    seconds = roofline.dense_estimate(heat.entrants[0].problem, operands.device).seconds
    layouts: dict[str, tuple[tuple[int, int], Any]] = {
        "dense_nk": ((operands.n, operands.k), lambda x, w: jnp.dot(x, w.T)),
        "dense_kn": ((operands.k, operands.n), jnp.dot),
    }
    for name, (shape, product) in layouts.items():
        ws = operands.dense(shape)
        xs = operands.rows(heat.m, len(ws))
        yield functools.partial(build, name, product, xs, ws, seconds, operands.effort)


def _builder(entrant: Entrant, operands: Operands) -> Callable[[], Program]:
    case, choice = entrant.cases[0], entrant.choice
    ws = operands.weights(case.scheme)
    xs = operands.rows(case.m, len(ws))
    product = functools.partial(qjax.matmul, backend=case.backend)
    name = choice.route.name.replace(".", "_")
    return functools.partial(build, name, product, xs, ws, choice.estimate.seconds, operands.effort)


def _run_heat(
    heat: Heat,
    programs: Sequence[Program | Exception],
    dense: Sequence[Program],
    operands: Operands,
    results: Results,
) -> list[Measured]:
    """Times one (m, n, k) between two measurements of the dense product."""
    runs = operands.effort.runs
    warm_up(dense[0])
    before, baseline = min(((time_program(p, runs).us, p) for p in dense), key=lambda pair: pair[0])
    timed: list[tuple[Entrant, Program, Timing]] = []
    for entrant, program in zip(heat.entrants, programs, strict=True):
        try:
            if isinstance(program, Exception):
                raise program
            timed.append((entrant, program, time_program(program, runs)))
        except Exception as error:  # it does not compile or does not run: a record less, and the file says why
            for case in entrant.cases:
                results.fail(case.key, one_line(error))
    after = time_program(baseline, runs).us
    of_dense = {"bf16_us": min(before, after), "bf16_drift": after / before - 1, "bf16_layout": baseline.name[-2:]}
    return [
        Measured({**dict(zip(KEYS["gemm"], case.key, strict=True)), **fields}, program, baseline)
        for entrant, program, timing in timed
        for fields in [_fields(entrant, program, timing, of_dense, operands, results)]
        for case in entrant.cases
    ]


def _fields(
    entrant: Entrant, program: Program, timing: Timing, of_dense: Record, operands: Operands, results: Results
) -> Record:
    """A record but for its key and kernel times."""
    scheme, problem, choice = entrant.cases[0].scheme, entrant.problem, entrant.choice
    least = roofline.estimate(problem, operands.device, roofline.PEAK)
    _, y = program.run()
    error = compare(y, rows_of(program.xs[0], program.ws[0]), operands.columns(scheme))
    seconds = timing.us * 1e-6
    return {
        "route": choice.route.name,
        "config": dict(choice.config),
        **timing._asdict(),
        "kernel_us": None,
        **of_dense,
        "bf16_kernel_us": None,
        "speedup": of_dense["bf16_us"] / timing.us,
        **error._asdict(),
        "share_of_bandwidth": least.bytes / seconds / results.machine["bandwidth"],
        "share_of_bf16_rate": least.operations / seconds / results.machine["bf16_rate"],
        "calls": program.calls,
        "weights": len(program.ws),
    }


def _add_kernel_times(measured: list[Measured]) -> None:
    """Puts what the profiler says into the records; each program is traced once."""
    programs = {id(p): p for one in measured for p in (one.program, one.dense)}
    found = dict(zip(programs, kernel_times(list(programs.values())), strict=True))
    for one in measured:
        one.record.update(kernel_us=found[id(one.program)], bf16_kernel_us=found[id(one.dense)])
