"""`qjax bench decode`: how many tokens a second a model writes, and where the time of a step goes.

For each model, batch and prompt one program is compiled that reads the prompts, and one that makes `STEPS` tokens of
every row without the host. Schemes run one after another, dense first; only one model is in memory at a time.

    tok/s = batch * STEPS / median time of the program          share = bytes a step must read / time / copy bandwidth

`ttft_8bit_ms` is the time of a prompt read with x in 8 bits, where `qjax.models.prefill` has that for the scheme.
A step must read every layer's kernels and the head once, and of the cache what lies before the middle of the run.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

import qjax
from qjax import devices
from qjax.bench.models import model_of
from qjax.bench.programs import one_line
from qjax.bench.records import KEYS, Record, Results
from qjax.bench.timing import kernels_of
from qjax.explain import layers
from qjax.models import Llama
from qjax.models.generate import decoder, prefill
from qjax.models.kv_cache import CODED, KVCache
from qjax.models.prefill import for_prompts
from qjax.schemes import Scheme

STEPS = 64
RUNS = 5
_NEAR = 0.75  # of the copy bandwidth: from there on memory bounds a step


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One measurement: `batch` rows of `prompt` tokens each, then `STEPS` more. Scheme None is dense.

    `cache` is how keys and values of past tokens are held, of `kv_cache.CODED`; None is as the model's dtype has them.
    """

    model: str
    scheme: Scheme | None
    backend: str
    batch: int
    prompt: int
    gpus: int
    cache: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What its record is found by."""
        name = "dense" if self.scheme is None else str(self.scheme)
        return "decode", self.model, name, self.backend, self.cache or "dense", self.batch, self.prompt, self.gpus


def decode_cases(
    models: Iterable[str],
    schemes: Iterable[Scheme],
    batches: Iterable[int],
    prompts: Iterable[int],
    *,
    backend: str = "auto",
    gpus: int = 1,
    cache: str | None = None,
) -> list[DecodeCase]:
    """Every combination; of each model the dense one first, with a dense cache, then scheme by scheme."""
    sizes = list(itertools.product(batches, prompts))
    return [
        DecodeCase(model, scheme, backend, batch, prompt, gpus, None if scheme is None else cache)
        for model in models
        for scheme in (None, *schemes)
        for batch, prompt in sizes
    ]


def bench_decode(
    cases: Iterable[DecodeCase],
    results: Results,
    *,
    steps: int = STEPS,
    runs: int = RUNS,
    budget: float | None = None,
    report: Callable[[Record], None] | None = None,
) -> bool:
    """Measures the cases that `results` lacks, and adds their records.

    Args:
      cases: those of one model and scheme that follow one another share its weights.
      results: where records go, and failures: what does not fit in memory is one.
      steps: tokens of each row that a program makes.
      runs: of each program, of which the median is taken.
      budget: seconds after which no other model is begun.
      report: told of every record once it is complete.

    Returns:
      Whether nothing was left out for lack of time.
    """
    started = time.monotonic()
    todo = [case for case in cases if case.key not in results]
    for _, group in itertools.groupby(todo, lambda case: (case.model, case.scheme, case.backend, case.gpus)):
        if budget is not None and time.monotonic() - started > budget:
            logging.warning("out of time: another run with the same file goes on with the rest")
            return False
        some = list(group)
        try:
            subject = Subject.of(some[0])
        except Exception as error:  # too large, or no such model: its records are missing, and the file says why
            for case in some:
                results.fail(case.key, one_line(error))
            continue
        for case in some:
            try:
                record = _measure(case, subject, results, steps, runs)
            except Exception as error:  # as above
                results.fail(case.key, one_line(error))
                continue
            results.add([record])
            if report is not None:
                report(record)
        del subject
    return True


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model taken apart for jit, and what it weighs.

    Attributes:
      weight_bytes: of all its arrays.
      step_bytes: of those that every step reads whole: kernels and the head.
    """

    definition: Any
    state: Any
    model: Llama
    weight_bytes: int
    step_bytes: int

    @classmethod
    def of(cls, case: DecodeCase) -> "Subject":
        """The model of a case, on as many devices as it names."""
        mesh = None if case.gpus == 1 else jax.make_mesh((case.gpus,), ("model",))
        model = model_of(case.model, case.scheme, devices.compute_dtype(devices.current()), mesh)
        definition, state = nnx.split(model)
        kernels = sum(layer.kernel.nbytes for layer in layers(model) if layer.name == "kernel")
        tied = model.embed_tokens.embedding.get_value().nbytes if model.lm_head is None else 0
        weighs = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return cls(definition, state, model, weighs, kernels + tied)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What is timed of a case: `read` and `read_coded` (x in 8 bits, or None) take nothing; `write` is `decode`."""

    read: Callable[[], Any]
    read_coded: Callable[[], Any] | None
    write: Any
    first: jax.Array
    cache: KVCache
    peak: int


def _compiled(case: DecodeCase, subject: Subject, steps: int) -> _Programs:
    """Compiles a case's programs, and reads the prompts once."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, subject.model.config.vocab_size, (case.batch, case.prompt), dtype=np.int32)
    prompt = ids, np.broadcast_to(np.arange(case.prompt, dtype=np.int32), ids.shape), None
    kept = None if case.cache is None else CODED[case.cache]
    lower = functools.partial(prefill.lower, subject.definition, capacity=case.prompt + steps, cache_dtype=kept)
    with qjax.use(backend=case.backend):
        read = lower(subject.state, *prompt).compile()
        first, cache = jax.block_until_ready(read(subject.state, *prompt))
        lowered = decoder(subject.state).lower(subject.definition, subject.state, first, cache, None, 1, count=steps)
        write = lowered.compile()
        coded = for_prompts(subject.state, ids.size, subject.model.dtype)
        structures: list[Any] = [jax.tree.structure(state) for state in (coded, subject.state)]
        other = None if structures[0] == structures[1] else lower(coded, *prompt).compile()
    return _Programs(
        functools.partial(read, subject.state, *prompt),
        None if other is None else functools.partial(other, coded, *prompt),
        write, first, cache, max(_peak(read), _peak(write)),
    )  # fmt: skip


def _measure(case: DecodeCase, subject: Subject, results: Results, steps: int, runs: int) -> Record:
    """Times prefill and decoding of one case."""
    programs = _compiled(case, subject, steps)
    ttft = _median(programs.read, runs)
    ttft_8bit = None if programs.read_coded is None else _median(programs.read_coded, runs)
    cache, start = programs.cache, programs.cache.lengths

    def again(cache: KVCache) -> KVCache:
        """One run on a cache that is given up; the same slots are written each time."""
        given = dataclasses.replace(cache, lengths=start + 0)
        _, cache = programs.write(subject.state, programs.first, given, None, 1)
        return jax.block_until_ready(cache)

    cache = again(cache)
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        cache = again(cache)
        found.append((time.perf_counter() - began) / steps)
    seconds = statistics.median(found)
    kernels = kernels_of(lambda: again(cache), steps) if devices.current().platform == "gpu" else []
    per_token = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers)) / (case.prompt + steps)
    step_bytes = subject.step_bytes + per_token * (case.prompt + steps / 2)
    dense = next((r for r in results if _beside(r, case)), None)
    return {
        **dict(zip(KEYS["decode"], case.key, strict=True)),
        "tok_s": case.batch / seconds,
        "step_us": seconds * 1e6,
        "step_us_min": min(found) * 1e6,
        "step_us_max": max(found) * 1e6,
        "bf16_tok_s": dense["tok_s"] if dense else None,
        "speedup": case.batch / seconds / dense["tok_s"] if dense else None,
        "ttft_ms": ttft * 1e3,
        "ttft_8bit_ms": None if ttft_8bit is None else ttft_8bit * 1e3,
        "bf16_ttft_ms": dense["ttft_ms"] if dense else None,
        "share_of_bandwidth": step_bytes / case.gpus / seconds / results.machine["bandwidth"],
        "weight_bytes": subject.weight_bytes,
        "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(cache)),
        "peak_bytes": programs.peak,
        "steps": steps,
        "kernels": kernels,
    }


def _beside(record: Record, case: DecodeCase) -> bool:
    """Whether a record is the dense one of the same size."""
    like = dataclasses.replace(case, scheme=None, cache=None, backend=record["backend"])
    return case.scheme is not None and tuple(record[name] for name in KEYS["decode"]) == like.key


def _peak(program: Any) -> int:
    """Bytes on a device while a compiled program runs."""
    use = program.memory_analysis()
    return use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes + use.temp_size_in_bytes


def _median(run: Callable[[], Any], runs: int) -> float:
    """Seconds of a call."""
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def bound_of(record: Record) -> str:
    """What a step's time is made of, in a line: its bytes at the copy bandwidth, its kernels, what is between them."""
    step, memory = record["step_us"], record["share_of_bandwidth"]
    text = f"what a step must read takes {memory * step:.0f} us at the copy bandwidth, {memory:.0%} of it"
    if not record["kernels"]:
        return text
    *rows, (_, _, rest, idle) = breakdown(record["kernels"], step)
    text += f"; {sum(n for _, n, _, _ in rows):.0f} kernels, and {rest:.0f} us between them"
    if memory >= _NEAR:
        return f"{text}: bound by memory"
    if idle > rows[0][3]:
        return f"{text}: bound by launches"
    return f"{text}: bound by its kernels, {rows[0][0]} first ({rows[0][3]:.0%})"


def breakdown(kernels: Sequence[Record], step_us: float) -> list[tuple[str, int, float, float]]:
    """(kernel, launches, microseconds, share) of a step, the longest first; what no kernel accounts for is last."""
    rows = [(k["name"], k["launches"], k["us"], k["us"] / step_us) for k in kernels]
    rest = step_us - sum(us for _, _, us, _ in rows)
    return [*sorted(rows, key=lambda row: -row[2]), ("between kernels", 0, rest, rest / step_us)]
