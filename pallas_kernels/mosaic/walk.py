"""Programs that stay and walk over the tiles of a result, and the roles of their warpgroups, for operands of 8 bits.

    producer      ring of stages, across tiles; of each tile the scales and the bias, one for each row of an operand
    2 consumers   sums of a tile, then scales, bias and y: while one tile is finished, stages of the next arrive

Names in a kernel's scratch: barriers `full` and `empty` of stages, `scaled` and `unscaled` of a tile's scales, `turn`
of consumers that take turns, and the entries of a tile by the names of their operands.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import columns
from pallas_kernels.mosaic.launch import place_in, read_barriers, slot_of

BAND = 16  # tiles along x that neighbours in time lie in
CONSUMERS = 2
REGISTERS = (40, 232)  # of a producer's thread and of a consumer's: 168 each is what the kernel starts with
SLOTS = 2  # pieces of a consumer's result on their way to memory


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which cluster computes which tiles: every so manieth, in bands: those that run together share both operands.

    Attributes:
      along_x, along_w: tiles of clusters along x and along the weight.
      programs: clusters that run.
      band: tiles along x that a band is high.
    """

    along_x: int
    along_w: int
    programs: int
    band: int = BAND

    def count(self, program: jax.Array) -> jax.Array:
        """How many tiles a cluster computes."""
        tiles = self.along_x * self.along_w
        return jax.lax.div(tiles - program + self.programs - 1, jnp.int32(self.programs))

    def tile(self, program: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a cluster's i-th tile lies, in tiles along x and along the weight."""
        number, size = program + i * self.programs, self.band * self.along_w
        if self.band >= self.along_x:
            return jax.lax.rem(number, jnp.int32(self.along_x)), jax.lax.div(number, jnp.int32(self.along_x))
        band, inside = jax.lax.div(number, size), jax.lax.rem(number, size)
        height = jnp.minimum(self.along_x - band * self.band, self.band)
        return band * self.band + jax.lax.rem(inside, height), jax.lax.div(inside, height)


class Plan(Protocol):
    """What a walk asks of a kernel's plan."""

    @property
    def walk(self) -> Walk:
        """Over the tiles of the result."""

    @property
    def steps(self) -> int:
        """Stages of a tile."""

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply; one more fills stages."""

    @property
    def readers(self) -> int:
        """Those of them that read one stage, the first of them the first."""

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer and of a consumer, of what the kernel starts with."""

    @property
    def tile(self) -> Any:
        """With the fields `stages` and `cluster`."""

    @property
    def interpret(self) -> bool:
        """Whether it runs in JAX's interpreter of such kernels."""

    def place(self, program: jax.Array, i: jax.Array, of_cluster: Any) -> tuple[jax.Array, jax.Array]:
        """First row of x and first row of the weight of a program's i-th tile."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a kernel does in a tile. Its functions are given its plan first and, last, its scratch and the result, `y`.

    Attributes:
      fill: given the number of a tile's first stage, its first rows of x and of the weight, and the operands by name,
        fills its stages, each once its `empty` says so.
      entries: names of operands with one column, float32 in `s`: of which operand's rows they are, 0 of x's and 1 of
        the weight's, and how many of them, a multiple of 128.
      sums: given a consumer's number and that of a tile's first stage, its part of the tile.
      store: given a consumer's number, that part and the tile's first rows, writes it.
      turns: whether consumers take turns.
    """

    fill: Callable[[Any, jax.Array, jax.Array, jax.Array, Mapping[str, Any], Any], None]
    entries: Mapping[str, tuple[int, int]]
    sums: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    store: Callable[[Any, jax.Array, jax.Array, tuple[jax.Array, jax.Array], Any], None]
    turns: bool = False


def barriers(
    tile: Any, *, arrivals: int, consumers: int = CONSUMERS, readers: int = CONSUMERS, turns: bool = False
) -> dict[str, Any]:
    """The barriers of the module's docstring; `arrivals`: those that fill a stage; the others as in `Plan`."""
    found = dict(
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=tile.stages),
        empty=read_barriers(tile.cluster, readers, tile.stages),
        scaled=plgpu.Barrier(),
        unscaled=plgpu.Barrier(num_arrivals=consumers),
    )
    return found | dict(turn=plgpu.Barrier(num_barriers=CONSUMERS)) if turns else found


def _produce(plan: Plan, roles: Roles, program: jax.Array, refs: Mapping[str, Any], s: Any) -> None:
    """Fills stage after stage, tile after tile."""
    if not plan.interpret:  # which knows neither
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

    @pl.loop(0, plan.walk.count(program))
    def one(i: jax.Array) -> None:
        first_rows = plan.place(program, i, place_in(plan.tile.cluster))
        roles.fill(plan, i * plan.steps, *first_rows, refs, s)
        plgpu.barrier_wait(s["unscaled"])
        for name, (operand, height) in roles.entries.items():
            entries = columns.read(refs[name], first_rows[operand], jnp.int32(0), height, plan.interpret)
            s[name][...] = entries.astype(jnp.float32)
        plgpu.barrier_arrive(s["scaled"])

    @pl.loop(0, plan.tile.stages)  # until all that was filled was read
    def drain(i: jax.Array) -> None:
        last = plan.walk.count(program) * plan.steps
        plgpu.barrier_wait(s["empty"].at[slot_of(last + i, plan.tile.stages)])

    plgpu.barrier_wait(s["unscaled"])


def _consume(plan: Plan, roles: Roles, program: jax.Array, warpgroup: jax.Array, s: Any) -> None:
    """A consumer's part of all tiles of its program."""

    @pl.when(warpgroup < plan.readers)
    def nothing_to_read_yet() -> None:
        @pl.loop(0, plan.tile.stages)
        def of_stage(slot: jax.Array) -> None:
            plgpu.barrier_arrive(s["empty"].at[slot])

    plgpu.barrier_arrive(s["unscaled"])
    if roles.turns:

        @pl.when(warpgroup == 1)
        def begin() -> None:
            plgpu.barrier_arrive(s["turn"].at[0])

    @pl.loop(0, plan.walk.count(program))
    def one(i: jax.Array) -> None:
        sums = roles.sums(plan, warpgroup, i * plan.steps, s)
        plgpu.barrier_wait(s["scaled"])
        roles.store(plan, warpgroup, sums, plan.place(program, i, place_in(plan.tile.cluster)), s)
        plgpu.barrier_arrive(s["unscaled"])

    if roles.turns:

        @pl.when(warpgroup == 0)
        def end() -> None:
            plgpu.barrier_wait(s["turn"].at[0])

    plgpu.wait_smem_to_gmem(0)


def walk(plan: Plan, roles: Roles, names: tuple[str, ...], *given: Any, **s: Any) -> None:
    """One warpgroup of one program; `given`: the operands by their `names`, and the result."""
    refs, s["y"] = dict(zip(names, given[:-1], strict=True)), given[-1]
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")

    few, many = plan.registers

    @pl.when(warpgroup == plan.consumers)
    def fill() -> None:
        plgpu.set_max_registers(few, action="decrease")
        _produce(plan, roles, program, refs, s)

    @pl.when(warpgroup < plan.consumers)
    def multiply() -> None:
        plgpu.set_max_registers(many, action="increase")
        _consume(plan, roles, program, warpgroup, s)
