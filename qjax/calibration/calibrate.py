"""`calibrate`: a model and batches of its input -> the model quantized by a recipe, layer after layer."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from qjax.calibration.act_scale import ActScale, as_act_scale, static_scale
from qjax.calibration.fold import Norm, Norms
from qjax.calibration.fold_linear import Linears, Source, divided, undividable
from qjax.calibration.journal import Done, Journal, task_of
from qjax.calibration.layer import Layer, factors_of, layer_of, quantize_layer
from qjax.calibration.model import check_batches, subject_of
from qjax.calibration.moments import Statistics
from qjax.calibration.program import trace
from qjax.calibration.recipe import Recipe, as_recipe
from qjax.calibration.segments import Stage, Unit
from qjax.calibration.subject import Subject
from qjax.calibration.walk import unreached, walk
from qjax.errors import CalibrationError
from qjax.flax_kernel import KernelLayout, home_of
from qjax.progress import track
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array
from qjax.sharding import shardings


def calibrate(
    model: Any,
    batches: Iterable[Any] | None,
    recipe: Recipe | str = "gptq",
    scheme_or_rules: Any = "w4a16",
    *,
    params: Any = None,
    partial_groups: bool = False,
    act_scale: ActScale = "max",
    resume: str | os.PathLike[str] | None = None,
    device_bytes: int | None = None,
    progress: bool | None = None,
    **apply_options: Any,
) -> Any:
    """Quantizes a model by a recipe that looks at what enters its layers.

    The model is traced once and cut where the inputs of its layers are known. Each piece runs once on every batch,
    behind layers that are quantized by then; what lies between pieces is kept, on the devices where it lies. Layers
    under jit, remat, scan and vmap are reached; those that share an input (q, k and v) are quantized together. An
    embedding that a rule names and that meets no query is rounded to nearest.

    Args:
      model: a linen module, or an nnx module, which is changed in place once all is done.
      batches: of one shape; each a tuple of the model's arguments, or the only one. None for recipes without data.
      recipe: a `qjax.calibration.Recipe` or its string.
      scheme_or_rules: as of `qjax.quantize`.
      params: of a linen module, as of `qjax.quantize`.
      partial_groups: allow a short last group where the group size does not divide K.
      act_scale: the range of schemes with static scales of x (`w8a8_int8:mode=static`): "max", the largest magnitude
        that was seen; a number such as 99.99, the percentile of magnitudes; "mse", that of least squared error.
      resume: a folder to keep finished layers in, made if it is not there. A call that was interrupted, repeated with
        the same arguments, goes on behind them, and makes what it would have made; then the folder can go.
      device_bytes: what is kept of all batches between two pieces of the model may take so much of the devices; beyond
        that it waits in the host's memory. The result is the same to the bit. Weights and the statistics of the layers
        at hand are not counted.
      progress: True, False, or None for a bar on a terminal when the work takes longer than two seconds.
      **apply_options: further arguments of a linen model's `apply`.

    Returns:
      The nnx module; of a linen module the params with QTensors for kernels.

    Raises:
      CalibrationError: no batch, batches of several shapes, a layer that no batch reaches, NaN or inf in what enters
        one (layer and batch named), a recipe that does not fit a scheme, a folder to resume from that another
        calibration has written.
      CheckpointError: such a folder that cannot be written or read.
      RuleError, QuantizeError: as `qjax.quantize` and `qjax.nnx.quantize`.
      NotImplementedError: a layer inside of a construct that is not looked into (while, cond, shard_map).
    """
    recipe = as_recipe(recipe)
    given = check_batches(batches)
    how = as_act_scale(act_scale)
    if recipe.scaling is not None and how != "max":
        raise CalibrationError(
            f"recipe {recipe} scales columns of x, of which act_scale='max' is known only; got {how}"
        )
    if device_bytes is not None and device_bytes < 0:
        raise CalibrationError(f"{device_bytes=}; allowed: 0 or more, or None for all there are")
    subject = subject_of(model, params, scheme_or_rules, given, apply_options)
    schemes = [target.rule.scheme for target in subject.targets.values()]
    static = next((scheme for scheme in schemes if scheme is not None and scheme.is_static), None)
    if not given and (recipe.needs_data or static is not None):
        what = f"recipe {recipe}" if static is None else f"scheme {static}"
        raise CalibrationError(f"{what} looks at what enters layers: give at least one batch, got none")
    journal = None
    if resume is not None:
        options = dict(recipe=recipe, act_scale=how, partial_groups=partial_groups, options=sorted(apply_options))
        journal = Journal(Path(resume), task_of(subject, given, **options))
    run = _Calibration(subject, recipe, partial_groups, how, journal)
    if given and (recipe.needs_data or static is not None):
        run.with_data(given, device_bytes, progress)
    else:
        run.without_data(progress)
    return subject.install(run.kernels(), run.norms)


@dataclasses.dataclass
class _Calibration:
    """What has been done so far.

    Attributes:
      subject, recipe, partial_groups, act_scale: the task.
      journal: where it is kept on disk, or None.
      leaves: the params, quantized kernels dequantized.
      layouts: of the kernels.
      found: the layers' QTensors.
      norms: leaves that took up factors, as they will be; biases of layers too.
    """

    subject: Subject
    recipe: Recipe
    partial_groups: bool
    act_scale: ActScale
    journal: Journal | None
    leaves: list[jax.Array] = dataclasses.field(init=False)
    layouts: dict[int, KernelLayout] = dataclasses.field(init=False)
    found: dict[Unit, QTensor] = dataclasses.field(default_factory=dict)
    norms: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leaves = list(self.subject.leaves)
        self.layouts = self.subject.layouts()

    def kernels(self) -> dict[int, QTensor]:
        """The QTensor of each kernel, where the kernel was."""
        made = {}
        for leaf, layout in self.layouts.items():
            w = layout.assemble(functools.partial(self._one, leaf))
            home = home_of(self.subject.leaves[leaf])
            where = self.subject.targets[leaf].path
            made[leaf] = w if home is None else jax.device_put(w, shardings(w, *home, where=where))
        return made

    def _one(self, leaf: int, index: tuple[int, ...]) -> QTensor:
        return self.found[leaf, index]

    def without_data(self, progress: bool | None) -> None:
        """Layer by layer, none of them called."""
        units = [(leaf, index) for leaf, layout in self.layouts.items() for index in np.ndindex(*layout.stack)]
        known = self._known()
        for number, unit in enumerate(track(units, "quantizing", show=progress)):
            made = None if number < known else quantize_layer(self._layer(unit), None, self.recipe)
            done = self._kept(number, [unit], None if made is None else Done({unit: (made, None)}))
            self.found[unit], _ = done.weights[unit]

    def with_data(self, batches: list[tuple[Any, ...]], device_bytes: int | None, progress: bool | None) -> None:
        """Along the model, every piece of it on all batches."""
        program = trace(self.subject.call, self.leaves, batches[0], self.subject.targets)
        for leaf in unreached(program, self.subject.targets):  # tables are rounded to nearest
            for index in np.ndindex(*self.layouts[leaf].stack):
                layer = self._layer((leaf, index))
                self._put((leaf, index), quantize_array(layer.weight, layer.scheme, where=layer.where))
        norms, linears = Norms.of(program), Linears.of(program, self.layouts)
        floats = self.subject.leaves if self.recipe.outputs == "float" else None
        stages = walk(
            program,
            batches,
            self.leaves,
            floats=floats,
            counted=self.act_scale != "max",
            known=self._known(),
            device_bytes=device_bytes,
            progress=progress,
        )
        taken = False
        for number, (stage, statistics) in enumerate(stages):
            made = None if statistics is None else self._quantize(stage, statistics, norms, linears)
            done = self._kept(number, self._units(stage), made)
            taken = taken or bool(done.norms or done.rows)
            self.norms |= done.norms
            # The model goes on with these as they were: what they have put out before is in the frontiers.
            self.found |= {unit: divided(self.found[unit], rows) for unit, rows in done.rows.items()}
            for unit, (w, factors) in done.weights.items():
                self._put(unit, w, factors)
        scaling = self.recipe.scaling
        if scaling is not None and scaling.unfolded == "skip" and not taken:
            what = "no layer has a norm or a linear before it that could take factors up"
            logging.warning("%s did nothing: %s", self.recipe, what)

    def _known(self) -> int:
        """How many stages the journal has."""
        return 0 if self.journal is None else self.journal.count()

    def _units(self, stage: Stage) -> list[Unit]:
        """Every matrix of a stage, stacked ones one after another."""
        leaf, index = stage.units[0]
        inner = np.ndindex(*self.layouts[leaf].stack[len(index) :])
        return [(leaf, (*index, *more)) for more in inner for leaf, index in stage.units]

    def _kept(self, number: int, units: list[Unit], made: Done | None) -> Done:
        """A stage that was made, now in the journal, or, if it was not, one that is there."""
        if made is None:
            assert self.journal is not None, number
            return self.journal.read(number, units)
        jax.block_until_ready([w for w, _ in made.weights.values()])
        if self.journal is not None:
            self.journal.write(number, made)
        return made

    def _layer(self, unit: Unit) -> Layer:
        leaf, index = unit
        target, kernel = self.subject.targets[leaf], self.subject.leaves[leaf]
        return layer_of(target, self.layouts[leaf], kernel, index, partial_groups=self.partial_groups)

    def _put(self, unit: Unit, w: QTensor, factors: jax.Array | None = None) -> None:
        """Keeps a layer's QTensor, and has the model go on with it; x will have been divided by `factors`."""
        self.found[unit] = w
        leaf, index = unit
        if factors is not None:
            w = dataclasses.replace(w, input_scale=1 / factors)
        old = self.leaves[leaf]
        kernel = jax.device_put(_dequantized(self.layouts[leaf].like_kernel(w), old.dtype), old.sharding)
        self.leaves[leaf] = old.at[index].set(kernel) if index else kernel

    def _quantize(self, stage: Stage, statistics: Statistics, norms: Norms, linears: Linears) -> Done:
        """The kernels of a stage, one stacked layer after another."""
        found: dict[Unit, tuple[QTensor, jax.Array | None]] = {}
        changed: dict[int, jax.Array] = {}
        rows: dict[Unit, jax.Array] = {}
        place = self._place(stage, norms, linears)
        count = len(stage.units)
        units = self._units(stage)
        for at in range(0, len(units), count):
            together = units[at : at + count]
            layers = [self._layer(unit) for unit in together]
            one = statistics.at(together[0][1][len(stage.units[0][1]) :])
            one.check(layers[0].where)
            found |= zip(together, self._scaled(place, layers, one, changed, rows), strict=True)
        return Done(found, changed, rows)

    def _place(self, stage: Stage, norms: Norms, linears: Linears) -> Norm | Source | None:
        """What can take up factors of the input of a stage."""
        scaling = self.recipe.scaling
        if scaling is None or len(stage.inputs) != 1:
            return None
        (seen,), taps = stage.inputs, len(stage.units)
        norm = norms.weight_before(seen, taps, self.leaves)
        source = linears.before(seen, taps) if scaling.linears and norm is None else None
        if source is None:
            return norm
        earlier = self.found.get(source.unit)  # not yet there where it is used once more, later
        return None if earlier is None or undividable(earlier) is not None else source

    def _scaled(
        self,
        place: Norm | Source | None,
        layers: list[Layer],
        statistics: Statistics,
        changed: dict[int, jax.Array],
        rows: dict[Unit, jax.Array],
    ) -> list[tuple[QTensor, jax.Array | None]]:
        """The QTensors of layers that share an input, each with the factors that were taken up (`changed`, `rows`)."""
        scaling = self.recipe.scaling
        if scaling is None or (place is None and scaling.unfolded == "skip"):
            return [(self._quantized(layer, statistics), None) for layer in layers]
        factors = factors_of(layers, statistics, self.recipe, place.outputs if isinstance(place, Source) else None)
        leaves = dict(enumerate(self.leaves)) | self.norms
        if isinstance(place, Norm):
            made, factors = place.divide(leaves, factors)
            changed |= made
        elif place is not None:
            rows[place.unit] = place.rows(factors, self.found[place.unit].out_features)
            changed |= place.divide(leaves, rows[place.unit])
        scaled = [dataclasses.replace(a, weight=a.weight * factors[:, None]) for a in layers]
        found = [self._quantized(layer, statistics.divided(factors)) for layer in scaled]
        found = [dataclasses.replace(w, dtype=a.weight.dtype) for w, a in zip(found, layers, strict=True)]
        if place is not None:
            return [(w, factors) for w in found]
        return [(dataclasses.replace(w, input_scale=1 / factors), None) for w in found]

    def _quantized(self, layer: Layer, statistics: Statistics) -> QTensor:
        """A layer's QTensor, with the static scale of x where its scheme has one."""
        w = quantize_layer(layer, statistics, self.recipe)
        x = layer.scheme.activation
        if x is None or not layer.scheme.is_static:
            return w
        scale = static_scale(statistics.peak, statistics.counts, x, self.act_scale)
        return dataclasses.replace(w, act_scale=scale)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantized(w: QTensor, dtype: np.dtype) -> jax.Array:
    return w.dequantize(dtype)
