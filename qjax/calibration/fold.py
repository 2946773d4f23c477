"""Where factors of a layer's input can go: into the weight of the norm that makes it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.program import TAP, Constant, Input, Program, Slot, Step


@dataclasses.dataclass(frozen=True)
class Norm:
    """The weight of a norm: x is multiplied by `param + offset`, channel by channel.

    Attributes:
      leaf, index: the param among the leaves and the index that scans take of it, `[K]`.
      offset: 1 in Gemma.
    """

    leaf: int
    index: tuple[int, ...]
    offset: float = 0.0

    def divide(self, whole: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The leaf `whole` with the norm's weight divided by factors, and what these come to in its dtype, float32."""
        before = whole[self.index].astype(jnp.float32) + self.offset
        param = (before / factors - self.offset).astype(whole.dtype)
        after = param.astype(jnp.float32) + self.offset
        exact = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
        return whole.at[self.index].set(param), exact


@dataclasses.dataclass(frozen=True)
class Norms:
    """Finds norms in a program.

    Attributes:
      program: the model.
      made: the step that makes a slot.
      read: the steps that read it.
    """

    program: Program
    made: dict[Slot, Step]
    read: dict[Slot, list[Step]]

    @classmethod
    def of(cls, program: Program) -> "Norms":
        """Those of a program."""
        read: dict[Slot, list[Step]] = {}
        for step in program.steps:
            for slot in step.inputs:
                if not isinstance(slot, Constant):
                    read.setdefault(slot, []).append(step)
        return cls(program, {slot: step for step in program.steps for slot in step.outputs}, read)

    def weight_before(self, seen: Input, taps: int, leaves: Sequence[jax.Array]) -> Norm | None:
        """The param that x is multiplied by, channel by channel, on its way to layers that are to be scaled.

        Args:
          seen: the layers' input.
          taps: how many layers there are; if x is read by more, nothing can be changed on its way.
          leaves: of the params.

        Returns:
          A param that is read there and nowhere else; None where there is none.
        """
        readers = [step.name for step in self.read.get(seen.slot, ())]
        if seen.contracted != (len(seen.shape) - 1,) or seen.stacked or readers != [TAP] * taps:
            return None
        made = self.made.get(seen.slot)
        return None if made is None else self._among_factors(made, seen.shape[-1], leaves)

    def _among_factors(self, step: Step, k: int, leaves: Sequence[jax.Array]) -> Norm | None:
        """The same among what a step multiplies; casts and broadcasts over rows are looked through."""
        if step.name == "mul":
            factors = step.inputs
        elif step.name == "add":
            return self._with_offset(step, k, leaves)
        elif step.name == "convert_element_type":
            factors = step.inputs[:1]
        elif step.name == "broadcast_in_dim" and step.params["broadcast_dimensions"][-1:] == (
            len(step.params["shape"]) - 1,
        ):
            factors = step.inputs[:1]
        elif step.name == "reshape" and step.params["new_sizes"][-1] == k:
            factors = step.inputs[:1]
        else:
            return None
        for slot in factors:
            if isinstance(slot, Constant) or len(self.read[slot]) != 1:
                continue
            if slot in self.program.origin:
                leaf, index = self.program.origin[slot]
                if leaves[leaf].shape[len(index) :] == (k,):
                    return Norm(leaf, index)
            elif slot in self.made:
                found = self._among_factors(self.made[slot], k, leaves)
                if found is not None:
                    return found
        return None

    def _with_offset(self, step: Step, k: int, leaves: Sequence[jax.Array]) -> Norm | None:
        """The same of a param to which a number is added."""
        for param, number in (step.inputs, step.inputs[::-1]):
            if isinstance(number, Constant) and np.ndim(number.value) == 0 and not isinstance(param, Constant):
                alone = dataclasses.replace(step, name="convert_element_type", inputs=(param,))
                found = self._among_factors(alone, k, leaves)
                if found is not None and not found.offset:
                    return dataclasses.replace(found, offset=float(number.value))
        return None
