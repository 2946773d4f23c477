"""Where factors of a layer's input can go where no norm makes it: into the rows of a kernel before it.

`down(act(gate) * up)` is the same when row j of up is divided by what column j of down is multiplied by; so are
attention's sums over values, where queries that share values share factors. Rows are divided after their rounding: of
codes with scales of rows only the scales change.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.channels import Labels, after
from qjax.calibration.program import TAP, Constant, Input, Program, Slot, Step
from qjax.calibration.segments import Unit
from qjax.flax_kernel import KernelLayout
from qjax.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Source:
    """A kernel before a layer: channel k of the layer's input is a multiple of its output `outputs[k]`.

    Attributes:
      unit: the kernel.
      outputs: int `[K]`.
      biases: params that are added to its outputs, each of N elements.
    """

    unit: Unit
    outputs: np.ndarray
    biases: tuple[Unit, ...] = ()

    def rows(self, factors: jax.Array, count: int) -> jax.Array:
        """What each of the kernel's outputs is divided by, for factors `[K]` that are one for one output."""
        return jnp.ones(count, jnp.float32).at[self.outputs].set(factors)

    def divide(self, leaves: Mapping[int, jax.Array], rows: jax.Array) -> dict[int, jax.Array]:
        """The leaves of the biases divided by rows `[N]`."""
        made: dict[int, jax.Array] = {}
        for leaf, index in self.biases:
            whole = made.get(leaf, leaves[leaf])
            bias = whole[index].astype(jnp.float32)
            made[leaf] = whole.at[index].set((bias / rows.reshape(bias.shape)).astype(whole.dtype))
        return made


def undividable(w: QTensor) -> str | None:
    """Why rows of a QTensor cannot be divided without changing its codes or rounding its values once more."""
    if w.scheme.block[0] != 1:
        return f"scales of {w.scheme.block[0] or 'all'} rows"
    if isinstance(w.scale, QTensor) or w.scale.dtype not in (jnp.float16, jnp.float32):
        return "scales that are quantized"
    return None if w.offset is None else "an offset"


def divided(w: QTensor, rows: jax.Array) -> QTensor:
    """A QTensor whose output n is divided by `rows[n]`: the same codes, each scale rounded once.

    Scales are float32 then where float16 ones would be subnormal or infinite.
    """
    assert not isinstance(w.scale, QTensor), w
    exact = w.scale.astype(jnp.float32) / rows[:, None]
    info, size = jnp.finfo(w.scale.dtype), jnp.abs(exact)
    fits = jnp.all((size == 0) | ((size >= float(info.smallest_normal)) & (size <= float(info.max))))
    return dataclasses.replace(w, scale=exact.astype(w.scale.dtype) if fits else exact)


@dataclasses.dataclass(frozen=True)
class _Path:
    """What a slot is a multiple of."""

    param: Unit
    labels: Labels
    biases: tuple[Unit, ...] = ()


@dataclasses.dataclass(frozen=True)
class Linears:
    """Finds kernels in a program.

    Attributes:
      program: the model.
      layouts: of the kernels that are quantized.
      made, read: as of `qjax.calibration.fold.Norms`.
    """

    program: Program
    layouts: Mapping[int, KernelLayout]
    made: dict[Slot, Step]
    read: dict[Slot, list[Step]]

    @classmethod
    def of(cls, program: Program, layouts: Mapping[int, KernelLayout]) -> "Linears":
        """Those of a program."""
        return cls(program, layouts, program.makers(), program.readers())

    def before(self, seen: Input, taps: int) -> Source | None:
        """The kernel that each channel of x is a multiple of one output of.

        Args:
          seen: the input of layers that are to be scaled.
          taps: how many layers there are; if x is read by more, nothing can be changed on its way.

        Returns:
          A kernel whose outputs are read there and nowhere else; None where there is none.
        """
        readers = [step.name for step in self.read.get(seen.slot, ())]
        step = self.made.get(seen.slot)
        if seen.stacked or readers != [TAP] * taps or step is None:
            return None
        path = self._through(step, kernel=True)
        kept = tuple(a for a in range(len(seen.shape)) if a not in seen.contracted)
        if path is None or any(path.labels.shape[a] > 1 for a in kept):
            return None
        labels = path.labels.transpose(*kept, *seen.contracted).reshape([path.labels.shape[a] for a in seen.contracted])
        outputs = np.broadcast_to(labels, [seen.shape[a] for a in seen.contracted]).ravel()
        return Source(path.param, outputs, path.biases)

    def _path(self, slot: Slot | Constant, *, kernel: bool) -> _Path | None:
        """Of a slot that is read once: the way from a kernel, or from another param."""
        if isinstance(slot, Constant) or len(self.read[slot]) != 1:
            return None
        if slot in self.program.origin:
            return self._start(slot, kernel=kernel)
        step = self.made.get(slot)
        return None if step is None else self._through(step, kernel=kernel)

    def _through(self, step: Step, *, kernel: bool) -> _Path | None:
        if step.name == "add" and kernel:
            return self._biased(*step.inputs) or self._biased(*step.inputs[::-1])
        shapes = [np.shape(s.value) if isinstance(s, Constant) else self.program.shapes[s] for s in step.inputs]
        for at, slot in enumerate(step.inputs):
            path = self._path(slot, kernel=kernel)
            labels = None if path is None else after(step, at, path.labels, shapes)
            if path is not None and labels is not None:
                return dataclasses.replace(path, labels=labels)
        return None

    def _biased(self, product: Slot | Constant, other: Slot | Constant) -> _Path | None:
        """A kernel's outputs to which a param is added that has an element for each."""
        path, bias = self._path(product, kernel=True), self._path(other, kernel=False)
        if path is None or bias is None or not np.array_equal(path.labels, bias.labels):
            return None
        return dataclasses.replace(path, biases=(*path.biases, bias.param))

    def _start(self, slot: Slot, *, kernel: bool) -> _Path | None:
        """A param that is read here only: a kernel that one layer multiplies by, or one that is no kernel."""
        leaf, index = self.program.origin[slot]
        shape, layout = self.program.shapes[slot], self.layouts.get(leaf)
        if kernel != (layout is not None) or not self._is_alone(slot):
            return None
        outputs: tuple[int, ...] = tuple(range(len(shape)))
        if layout is not None:
            if (
                len(layout.stack) != len(index)
                or sum((t.leaf, t.index) == (leaf, index) for t in self.program.taps) != 1
            ):
                return None
            outputs = layout.order[len(layout.in_shape) :]
        sizes = [shape[a] if a in outputs else 1 for a in range(len(shape))]
        return _Path((leaf, index), np.arange(np.prod(sizes, dtype=int)).reshape(sizes))

    def _is_alone(self, slot: Slot) -> bool:
        """Whether no other slot that is read holds what this one does; scans' slices of a whole are looked through."""
        leaf, index = self.program.origin[slot]
        for other, (theirs, part) in self.program.origin.items():
            if other == slot or theirs != leaf or part != index[: len(part)]:
                continue
            if not all(step.outputs and step.outputs[0] in self.program.origin for step in self.read.get(other, ())):
                return False
            if part == index and self.read.get(other):
                return False
        return True
