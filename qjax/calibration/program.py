"""A traced model as a straight line of steps, with the taps in it: what lets calibration go layer by layer.

A jaxpr's calls that hold taps are inlined and its scans unrolled, so that every layer, stacked or not, stands in one
line. A tap's kernel is traced back to the param it is, or to the slice that a scan took of it.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from qjax.calibration.tap import tap_p

# Calls that are no more than their body, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

TAP = "tap"
RETURN = "return"

type Slot = int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An input of a step that is known."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """`outputs = run(*inputs)`; `name` and `params` are the primitive's."""

    name: str
    params: Mapping[str, Any]
    run: Callable[..., Sequence[Any]]
    inputs: tuple[Slot | Constant, ...]
    outputs: tuple[Slot, ...]


@dataclasses.dataclass(frozen=True)
class Input:
    """What a tap saw: the slot, its shape, and its axes as of `qjax.calibration.tap.rows`."""

    slot: Slot
    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    stacked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A layer's kernel (its leaf among the params and, where scans slice it, the index) and what entered."""

    leaf: int
    index: tuple[int, ...]
    input: Input


@dataclasses.dataclass
class Program:
    """The line.

    Attributes:
      params: slots of the params' leaves.
      arguments: slots of the batch's leaves.
      kernels: leaves whose taps are wanted.
      steps, taps: in order.
      origin: slots that are params or slices of them -> leaf and index.
      shapes: of slots.
      returned: slots that the model gives back.
    """

    params: tuple[Slot, ...] = ()
    arguments: tuple[Slot, ...] = ()
    kernels: Collection[int] = ()
    steps: list[Step] = dataclasses.field(default_factory=list)
    taps: list[Tap] = dataclasses.field(default_factory=list)
    origin: dict[Slot, tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    shapes: dict[Slot, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    returned: tuple[Slot, ...] = ()
    _slots: int = 0

    def makers(self) -> dict[Slot, Step]:
        """The step that makes a slot."""
        return {slot: step for step in self.steps for slot in step.outputs}

    def readers(self) -> dict[Slot, list[Step]]:
        """The steps that read a slot, and one named `RETURN` for what the model gives back."""
        found: dict[Slot, list[Step]] = {}
        for step in (*self.steps, Step(RETURN, {}, lambda *_: [], self.returned, ())):
            for slot in step.inputs:
                if not isinstance(slot, Constant):
                    found.setdefault(slot, []).append(step)
        return found

    def _new(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Slot, ...]:
        slots = tuple(range(self._slots, self._slots + len(shapes)))
        self._slots += len(shapes)
        self.shapes |= zip(slots, shapes, strict=True)
        return slots

    def _shape(self, x: Slot | Constant) -> tuple[int, ...]:
        return tuple(np.shape(x.value)) if isinstance(x, Constant) else self.shapes[x]

    def _add(
        self,
        name: str,
        run: Callable[..., Sequence[Any]],
        inputs: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        params: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Slot, ...]:
        outputs = self._new(shapes)
        self.steps.append(Step(name, params, run, tuple(inputs), outputs))
        return outputs

    def _inline(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        """Appends the steps of a jaxpr; the slots or constants of what it returns."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(Constant, jaxpr.consts), strict=True))
        env |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> Any:
            return Constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env |= zip(eqn.outvars, self._equation(eqn, [read(a) for a in eqn.invars]), strict=True)
        return [read(a) for a in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        if eqn.primitive is tap_p:
            x, kernel = inputs
            leaf, _ = self.origin.get(kernel, (None, ()))
            if leaf not in self.kernels or isinstance(x, Constant):
                return [x]
            self.taps.append(Tap(*self.origin[kernel], Input(x, _shape(eqn.invars[0]), **eqn.params)))
            return self._add(TAP, lambda x: [x], [x], [_shape(eqn.invars[0])])
        if not _holds_taps(eqn):
            return self._add(eqn.primitive.name, _runner(eqn), inputs, [_shape(a) for a in eqn.outvars], eqn.params)
        if eqn.primitive.name == "scan":
            return self._unroll(eqn, inputs)
        if eqn.primitive.name not in CALLS:
            raise NotImplementedError(
                f"a layer that is to be calibrated is called inside of `{eqn.primitive.name}`, which calibration does "
                "not look into; jit, remat, scan and vmap it does"
            )
        return self._inline(eqn.params[CALLS[eqn.primitive.name]], inputs)

    def _unroll(self, eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
        consts, carry, xs = (list(part) for part in eqn.params["ft_in"].update(inputs).unpack())
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        made: list[list[Any]] = [[] for _ in range(length)]
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            slices = [self._slice(x, i) for x in xs]
            out = self._inline(body, [*consts, *carry, *slices])
            carry, made[i] = out[: len(carry)], out[len(carry) :]
        stacked = [
            self._add("stack", lambda *parts: [jnp.stack(parts)], parts, [(length, *self._shape(parts[0]))])[0]
            for parts in zip(*made, strict=True)
        ]
        return [*carry, *stacked]

    def _slice(self, x: Any, i: int) -> Any:
        (out,) = self._add("slice", lambda a: [a[i]], [x], [self._shape(x)[1:]])
        if x in self.origin:
            leaf, index = self.origin[x]
            self.origin[out] = (leaf, (*index, i))
        return out


def _holds_taps(eqn: JaxprEqn) -> bool:
    """Whether there is a tap somewhere in the jaxprs of an equation."""
    return any(
        inner.primitive is tap_p or _holds_taps(inner)
        for value in jax.tree.leaves(eqn.params)
        if isinstance(value, Jaxpr)
        for inner in value.eqns
    )


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _runner(eqn: JaxprEqn) -> Callable[..., Sequence[Any]]:
    def run(*args: Any) -> Sequence[Any]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        return out if eqn.primitive.multiple_results else [out]

    return run


def trace(call: Callable[[list[Any], Any], Any], params: list[Any], batch: Any, kernels: Collection[int]) -> Program:
    """The program of `call(params, batch)`, in which layers tap what enters them.

    Args:
      call: runs the model.
      params: leaves, arrays.
      batch: a tree of arrays.
      kernels: the leaves of `params` whose taps are wanted.

    Raises:
      NotImplementedError: a layer inside of a construct that is not looked into.
    """
    jaxpr = jax.make_jaxpr(call)(params, batch)
    program = Program(kernels=kernels)
    program.params = program._new([np.shape(a) for a in params])
    program.arguments = program._new([np.shape(a) for a in jax.tree.leaves(batch)])
    program.origin = {slot: (leaf, ()) for leaf, slot in enumerate(program.params)}
    returned = program._inline(jaxpr, [*program.params, *program.arguments])
    program.returned = tuple(slot for slot in returned if not isinstance(slot, Constant))
    return program
