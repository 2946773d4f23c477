"""A program cut where layers' inputs are known, so that each piece runs once, on the layers before it as quantized."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qjax.calibration.program import Constant, Input, Program, Slot, Step

type Unit = tuple[int, tuple[int, ...]]  # a kernel's leaf, and the index that scans take of it
type Frontier = dict[Slot, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Kernels that meet the same inputs: q, k and v; gate and up. Of a kernel that is used twice, both inputs."""

    units: tuple[Unit, ...]
    inputs: tuple[Input, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Steps up to where a layer's input is known.

    Attributes:
      steps: those that inputs depend on.
      params: slots that are read of the params, by leaf.
      live: slots that later segments read.
      inputs: what is known at its end.
      stages: kernels all of whose inputs are known by then.
    """

    steps: tuple[Step, ...]
    params: Mapping[int, Slot]
    live: frozenset[Slot]
    inputs: tuple[Input, ...]
    stages: tuple[Stage, ...]

    @functools.cached_property
    def run(self) -> Any:
        """`(leaves of the params it reads, frontier) -> (values at its inputs, frontier after)`, jitted."""

        def run(params: dict[int, jax.Array], frontier: Frontier) -> tuple[list[jax.Array], Frontier]:
            env: dict[Slot, Any] = dict(frontier) | {slot: params[leaf] for leaf, slot in self.params.items()}
            for step in self.steps:
                values = (i.value if isinstance(i, Constant) else env[i] for i in step.inputs)
                env |= zip(step.outputs, step.run(*values), strict=True)
            return [env[i.slot] for i in self.inputs], {slot: env[slot] for slot in sorted(self.live)}

        return jax.jit(run)


def _stages(program: Program) -> list[Stage]:
    inputs: dict[Unit, dict[Input, None]] = {}
    for tap in program.taps:
        inputs.setdefault((tap.leaf, tap.index), {})[tap.input] = None
    groups: dict[tuple[Input, ...], list[Unit]] = {}
    for unit, seen in inputs.items():
        groups.setdefault(tuple(seen), []).append(unit)
    return [Stage(tuple(units), seen) for seen, units in groups.items()]


def cut(program: Program) -> list[Segment]:
    """The segments of a program, up to the last input; what no input depends on is left out."""
    made = {slot: i + 1 for i, step in enumerate(program.steps) for slot in step.outputs}
    stages = _stages(program)
    ends: dict[int, dict[Input, None]] = {}
    for seen in (i for stage in stages for i in stage.inputs):
        ends.setdefault(made.get(seen.slot, 0), {})[seen] = None
    due: dict[int, list[Stage]] = {}
    for stage in stages:
        due.setdefault(max(made.get(i.slot, 0) for i in stage.inputs), []).append(stage)
    leaves = {slot: leaf for leaf, slot in enumerate(program.params)}
    segments: list[Segment] = []
    needed: set[Slot] = set()
    stops = sorted(ends)
    for start, stop in reversed(list(zip([0, *stops], stops, strict=False))):
        live = frozenset(needed - leaves.keys())
        needed |= {i.slot for i in ends[stop]}
        steps: list[Step] = []
        read: set[Slot] = needed & leaves.keys()
        for step in reversed(program.steps[start:stop]):
            if needed.isdisjoint(step.outputs):
                continue
            steps.append(step)
            slots = {i for i in step.inputs if not isinstance(i, Constant)}
            needed = (needed - set(step.outputs)) | slots
            read |= slots & leaves.keys()
        params = {leaves[slot]: slot for slot in sorted(read)}
        segments.append(Segment(tuple(reversed(steps)), params, live, tuple(ends[stop]), tuple(due.get(stop, ()))))
    return segments[::-1]


def start(program: Program, batch: Any) -> Frontier:
    """What the first segment reads of a batch."""
    return dict(zip(program.arguments, jax.tree.leaves(batch), strict=True))


def advance(
    segment: Segment, leaves: Sequence[jax.Array], frontier: Frontier
) -> tuple[dict[Input, jax.Array], Frontier]:
    """One segment on one batch: what enters layers at its end, and what the next segments read."""
    seen, after = segment.run({leaf: leaves[leaf] for leaf in segment.params}, frontier)
    return dict(zip(segment.inputs, seen, strict=True)), after
