"""`walk`: a program run piece by piece on all batches, stopping where all that enters some layers is known."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.moments import Statistics, add, measure
from qjax.calibration.program import Input, Program
from qjax.calibration.segments import Frontier, Segment, Stage, advance, cut, start
from qjax.calibration.subject import Target
from qjax.errors import CalibrationError
from qjax.progress import track


def walk(
    program: Program,
    batches: Sequence[Any],
    leaves: Sequence[jax.Array],
    *,
    floats: Sequence[jax.Array] | None = None,
    counted: bool = False,
    known: int = 0,
    device_bytes: int | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[Stage, Statistics | None]]:
    """Every stage of layers with what enters it, summed over all batches, in the order of the model.

    Args:
      program: the model.
      batches: each the model's arguments, of one shape.
      leaves: the params. What changes in them between two stages is what the model goes on with.
      floats: other params to run the model with at its side, for statistics that compare both.
      counted: whether magnitudes of inputs are counted too.
      known: how many of the first stages need no statistics, and get None.
      device_bytes: what lies between segments may take so much of the devices; None for all it needs.
      progress: as of `qjax.progress.track`.
    """
    segments = cut(program)
    share = None if device_bytes is None else device_bytes // (len(batches) * (1 if floats is None else 2))
    frontiers = [start(program, batch) for batch in batches]
    beside = list(frontiers) if floats is not None else None
    kept: dict[Input, Statistics] = {}
    stages = [stage for segment in segments for stage in segment.stages]
    skipped, wanted = set(stages[:known]), {key for stage in stages[known:] for key in stage.inputs}
    for at, segment in enumerate(track(segments, "calibrating", show=progress)):
        for number in range(len(batches)):
            seen, after = advance(segment, leaves, fetched(frontiers[number]))
            frontiers[number] = stored(after, share)
            aims: dict[Input, jax.Array] = {}
            if floats is not None and beside is not None:
                aims, after = advance(segment, floats, fetched(beside[number]))
                beside[number] = stored(after, share)
            for key, x in seen.items():
                if key not in wanted:
                    continue
                one = measure(x, aims.get(key), jnp.int32(number), key.contracted, key.stacked, counted)
                kept[key] = add(kept[key], one) if key in kept else one
        for stage in segment.stages:
            yield stage, None if stage in skipped else functools.reduce(add, [kept[key] for key in stage.inputs])
        _forget(kept, segments[at + 1 :])


def unreached(program: Program, targets: Mapping[int, Target]) -> list[int]:
    """The leaves of tables that are only looked up, so that nothing enters them.

    Raises:
      CalibrationError: another layer that no batch reaches.
    """
    reached = {tap.leaf for tap in program.taps}
    found = [leaf for leaf in targets if leaf not in reached]
    for leaf in found:
        if not targets[leaf].is_table:
            raise CalibrationError(f"{targets[leaf].path}: no batch reaches this layer; leave it out by a rule")
    return found


def stored(frontier: Frontier, share: int | None) -> Frontier:
    """A batch's values where they wait: on the devices if they take no more than `share` bytes, else with the host."""
    if share is None or sum(a.nbytes for a in frontier.values()) <= share:
        return frontier
    return {slot: jax.device_put(a, a.sharding.with_memory_kind("pinned_host")) for slot, a in frontier.items()}


def fetched(frontier: Frontier) -> Frontier:
    """The same values on the devices; those of a first segment are as the caller gave them."""

    def fetch(a: jax.Array) -> jax.Array:
        if not isinstance(a, jax.Array) or a.sharding.memory_kind != "pinned_host":
            return a
        return jax.device_put(a, a.sharding.with_memory_kind("device"))

    return {slot: fetch(a) for slot, a in frontier.items()}


def _forget(kept: dict[Input, Statistics], later: Sequence[Segment]) -> None:
    """Drops what no stage of later segments waits for."""
    waited = {key for segment in later for stage in segment.stages for key in stage.inputs}
    for key in [key for key in kept if key not in waited]:
        del kept[key]
