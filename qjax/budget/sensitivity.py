"""How much a model loses by each candidate in each layer: errors from statistics, and one measurement a layer.

With H the mean of x x' over calibration tokens, a layer's error is `e = tr((W - W') H (W - W')')`, and what the model
loses by it is proportional to e while it is small: `loss = slope * e`. The slope is measured, layer by layer, by a run
of the model in which only this layer is quantized, to the candidate with the largest error; losses of layers add up.
Source: Malinovskii et al., Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (2024),
there with the identity for H.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.budget.mixture import Option, Sensitivity
from qjax.calibration.layer import Layer, layer_of, quantize_layer
from qjax.calibration.moments import Statistics
from qjax.calibration.program import trace
from qjax.calibration.recipe import Nearest, Recipe
from qjax.calibration.segments import Unit
from qjax.calibration.subject import Subject
from qjax.calibration.walk import unreached, walk
from qjax.errors import CalibrationError, QuantizeError
from qjax.flax_kernel import KernelLayout
from qjax.progress import track
from qjax.qtensor import QTensor
from qjax.quantize import check_kernel
from qjax.schemes import Scheme

NEAREST = Nearest()

type Distance = Callable[[Any, Any], jax.Array]


def mean_kl(base: jax.Array, found: jax.Array) -> jax.Array:
    """Mean KL(base || found) in nats of logits `[..., V]`, float32."""
    theirs, ours = (jax.nn.log_softmax(a.astype(jnp.float32), axis=-1) for a in (base, found))
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


@dataclasses.dataclass
class Survey:
    """What has been found of the layers so far.

    Attributes:
      subject: the float model.
      candidates: schemes, and None for float.
      recipe: how layers are rounded.
      partial_groups: as of `qjax.quantize`.
      layouts: of the kernels.
      nbytes, errors: leaf -> of each candidate; one that does not fit has no entry.
      probes: the matrix of largest error of each layer.
    """

    subject: Subject
    candidates: Sequence[Scheme | None]
    recipe: Recipe
    partial_groups: bool
    layouts: dict[int, KernelLayout] = dataclasses.field(init=False)
    nbytes: dict[int, dict[Scheme | None, int]] = dataclasses.field(default_factory=dict)
    errors: dict[int, dict[Scheme | None, float]] = dataclasses.field(default_factory=dict)
    probes: dict[Unit, tuple[float, QTensor]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layouts = self.subject.layouts()

    def run(self, batches: list[tuple[Any, ...]], distance: Distance, progress: bool | None) -> list[Sensitivity]:
        """Errors of all candidates, then the slopes.

        Raises:
          CalibrationError: a layer that no batch reaches, NaN in one, an output without a distance.
          QuantizeError: a layer that no candidate fits.
        """
        program = trace(self.subject.call, self.subject.leaves, batches[0], self.subject.targets)
        for leaf in unreached(program, self.subject.targets):
            for index in np.ndindex(*self.layouts[leaf].stack):
                self._try((leaf, index), None)
        for stage, statistics in walk(program, batches, self.subject.leaves, progress=progress):
            assert statistics is not None, "no stage is known"
            for leaf, index in stage.units:
                for inner in np.ndindex(*self.layouts[leaf].stack[len(index) :]):
                    self._try((leaf, (*index, *inner)), statistics.at(inner))
        slopes = self._slopes(batches, distance, progress)
        return [self._sensitivity(leaf, slopes[leaf]) for leaf in self.subject.targets]

    def _try(self, unit: Unit, statistics: Statistics | None) -> None:
        """One matrix by every candidate; a table that meets no x has errors as if H were the identity."""
        leaf, index = unit
        target, kernel = self.subject.targets[leaf], self.subject.leaves[leaf]
        layer = layer_of(target, self.layouts[leaf], kernel, index, partial_groups=self.partial_groups)
        if statistics is not None:
            statistics.check(layer.where)
        recipe = NEAREST if statistics is None and self.recipe.needs_data else self.recipe
        nbytes, errors = self.nbytes.setdefault(leaf, {}), self.errors.setdefault(leaf, {})
        for candidate in self._fitting(layer):
            if candidate is None:
                nbytes[None], errors[None] = kernel.nbytes, 0.0
                continue
            w = quantize_layer(dataclasses.replace(layer, scheme=candidate), statistics, recipe)
            error = float(_error(layer.weight, w, None if statistics is None else statistics.hessian()))
            nbytes[candidate] = nbytes.get(candidate, 0) + w.nbytes
            errors[candidate] = errors.get(candidate, 0.0) + error
            if unit not in self.probes or error > self.probes[unit][0]:
                self.probes[unit] = (error, w)

    def _fitting(self, layer: Layer) -> list[Scheme | None]:
        """The candidates that a layer's shape allows; where there is none, the error of the last."""
        found: list[Scheme | None] = []
        refusal: QuantizeError | None = None
        for one in self.candidates:
            try:
                if one is not None:
                    check_kernel(layer.where, layer.weight, one, layer.partial_groups, layer.k_pieces)
                found.append(one)
            except QuantizeError as error:
                refusal = error
        if refusal is not None and not found:
            raise refusal
        return found

    def _slopes(self, batches: list[tuple[Any, ...]], distance: Distance, progress: bool | None) -> dict[int, float]:
        """What the model loses for a unit of each layer's error: as many runs as there are layers, and one."""
        call, leaves = self.subject.call, self.subject.leaves
        output = jax.jit(call)
        loss = jax.jit(lambda base, leaves, batch: distance(base, call(leaves, batch)))
        totals = dict.fromkeys(self.subject.targets, 0.0)
        for batch in batches:
            base = output(leaves, batch)
            for leaf in track(list(totals), "measuring", show=progress):
                some = [*leaves]
                some[leaf] = self._probe(leaf)
                totals[leaf] += float(_scalar(loss(base, some, batch))) / len(batches)
        slopes = {}
        for leaf, total in totals.items():
            error = sum(found for (other, _), (found, _) in self.probes.items() if other == leaf)
            slopes[leaf] = max(total, 0.0) / error if error else 0.0
        return slopes

    def _probe(self, leaf: int) -> jax.Array:
        """The kernel with each of its matrices as the candidate of largest error has it."""
        kernel, layout = self.subject.leaves[leaf], self.layouts[leaf]
        for (other, index), (_, w) in self.probes.items():
            if other == leaf:
                part = layout.like_kernel(w).dequantize(kernel.dtype)
                kernel = kernel.at[index].set(part) if index else part
        sharding = self.subject.leaves[leaf].sharding
        # One that is there already stays as it is: putting it there commits it, and jit compiles anew for each leaf.
        return kernel if kernel.sharding == sharding else jax.device_put(kernel, sharding)

    def _sensitivity(self, leaf: int, slope: float) -> Sensitivity:
        path = self.subject.targets[leaf].path.rpartition("/")[0]
        nbytes, errors = self.nbytes[leaf], self.errors[leaf]
        options = tuple(Option(one, nbytes[one], errors[one], slope * errors[one]) for one in nbytes)
        return Sensitivity(path, self.subject.leaves[leaf].size, slope, options)


@jax.jit
def _error(weight: jax.Array, w: QTensor, hessian: jax.Array | None) -> jax.Array:
    """`tr((W - W') H (W - W')')` of a matrix `[K, N]`; H is the identity where it is None."""
    lost = weight.astype(jnp.float32) - w.dequantize(jnp.float32)
    return jnp.sum(lost * (lost if hessian is None else jnp.matmul(hessian, lost, precision="highest")))


def _scalar(loss: Any) -> Any:
    if np.shape(loss) != () or not np.isfinite(loss):
        raise CalibrationError(f"a distance is one finite number; got {loss}")
    return loss
