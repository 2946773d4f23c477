"""Subject: what calibration needs of a model, whichever Flax it is made of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qjax.flax_kernel import KernelLayout, KernelUse, layout_of
from qjax.qtensor import QTensor
from qjax.rules import Rule


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel that is to be quantized.

    Attributes:
      path: of the param; errors name it.
      use: its axes.
      rule: how.
      is_table: an embedding, which may meet no x at all.
    """

    path: str
    use: KernelUse
    rule: Rule
    is_table: bool


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
      leaves: all of its params, arrays.
      call: `(leaves, batch) -> anything`; the layers of the model tap what enters them.
      targets: leaf -> what is to become of it.
      install: the kernels, changed norms and biases by their leaves -> the quantized model, as the caller gets it.
    """

    leaves: list[jax.Array]
    call: Callable[[list[Any], Any], Any]
    targets: Mapping[int, Target]
    install: Callable[[Mapping[int, QTensor], Mapping[int, jax.Array]], Any]

    def layouts(self) -> dict[int, KernelLayout]:
        """Those of the kernels, by leaf."""
        return {leaf: layout_of(t.path, self.leaves[leaf].shape, t.use) for leaf, t in self.targets.items()}
