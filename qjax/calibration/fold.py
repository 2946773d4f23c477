"""Where factors of a layer's input can go: into the weight of the norm that makes it."""

import dataclasses
from collections.abc import Mapping, Sequence

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
      bias: what is added to the product then, as LayerNorm does; a param too.
    """

    leaf: int
    index: tuple[int, ...]
    offset: float = 0.0
    bias: "Norm | None" = None

    def divide(self, leaves: Mapping[int, jax.Array], factors: jax.Array) -> tuple[dict[int, jax.Array], jax.Array]:
        """The leaves of the weight and the bias divided by factors `[K]`.

        Returns:
          These leaves, and what the factors come to in the weight's dtype, float32.
        """
        whole = leaves[self.leaf]
        before = whole[self.index].astype(jnp.float32) + self.offset
        param = (before / factors - self.offset).astype(whole.dtype)
        after = param.astype(jnp.float32) + self.offset
        exact = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
        bias = {} if self.bias is None else self.bias.divide(leaves, exact)[0]
        return {**bias, self.leaf: whole.at[self.index].set(param)}, exact


@dataclasses.dataclass(frozen=True)
class Norms:
    """Finds norms in a program.

    Attributes:
      program: the model.
      made: the step that makes a slot.
      read: the steps that read it; the model's return is one.
    """

    program: Program
    made: dict[Slot, Step]
    read: dict[Slot, list[Step]]

    @classmethod
    def of(cls, program: Program) -> "Norms":
        """Those of a program."""
        return cls(program, program.makers(), program.readers())

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
        return None if made is None else self._norm(made, seen.shape[-1], leaves)

    def _made(self, slot: Slot | Constant) -> Step | None:
        """The step that makes a slot which is read once."""
        return None if isinstance(slot, Constant) or len(self.read[slot]) != 1 else self.made.get(slot)

    def _norm(self, step: Step, k: int, leaves: Sequence[jax.Array]) -> Norm | None:
        """A param among what a step multiplies, or that of a product and the param that is added to it."""
        if _keeps_channels(step, k):
            made = self._made(step.inputs[0])
            return None if made is None else self._norm(made, k, leaves)
        for slot, other in (step.inputs, step.inputs[::-1]) if step.name in ("mul", "add") else ():
            made = self._made(slot)
            found = None if made is None else self._norm(made, k, leaves)
            if step.name == "mul":
                found = self._param(slot, k, leaves) or found
            elif found is not None:
                bias = self._param(other, k, leaves)
                found = None if bias is None or found.bias is not None else dataclasses.replace(found, bias=bias)
            if found is not None:
                return found
        return None

    def _param(self, slot: Slot | Constant, k: int, leaves: Sequence[jax.Array]) -> Norm | None:
        """The param that a slot is, a number added to it or not; casts and broadcasts over rows are looked through."""
        if isinstance(slot, Constant) or len(self.read[slot]) != 1:
            return None
        if slot in self.program.origin:
            leaf, index = self.program.origin[slot]
            return Norm(leaf, index) if leaves[leaf].shape[len(index) :] == (k,) else None
        step = self.made.get(slot)
        if step is None:
            return None
        if _keeps_channels(step, k):
            return self._param(step.inputs[0], k, leaves)
        for param, number in (step.inputs, step.inputs[::-1]) if step.name == "add" else ():
            if isinstance(number, Constant) and np.ndim(number.value) == 0:
                found = self._param(param, k, leaves)
                if found is not None and not found.offset:
                    return dataclasses.replace(found, offset=float(number.value))
        return None


def _keeps_channels(step: Step, k: int) -> bool:
    """Whether a step casts its input, or repeats or reshapes it along other axes than the last, of K."""
    if step.name == "broadcast_in_dim":
        return step.params["broadcast_dimensions"][-1:] == (len(step.params["shape"]) - 1,)
    if step.name == "reshape":
        return step.params["new_sizes"][-1] == k
    return step.name == "convert_element_type"
