"""What calibration has done so far, on disk: a folder for each stage, written whole or not at all.

Weights and norms are kept to the bit, so a run that goes on from here makes what an uninterrupted one makes. A journal
belongs to one task: recipe, rules, params and batches; those are told by a sum of their bits.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration.segments import Unit
from qjax.calibration.subject import Subject
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.native import from_arrays, to_arrays, to_record
from qjax.checkpoints.write import write_folder
from qjax.errors import CalibrationError
from qjax.qtensor import QTensor, validate_qtensor


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a stage.

    Attributes:
      weights: of each unit the QTensor, and the factors float32 `[K]` that a norm divides its x by, or None.
      norms: leaves that took up such factors, as they are after this stage; biases of layers too.
      rows: of earlier layers that took them up, what each output is divided by, float32 `[N]`.
    """

    weights: Mapping[Unit, tuple[QTensor, jax.Array | None]]
    norms: Mapping[int, jax.Array] = dataclasses.field(default_factory=dict)
    rows: Mapping[Unit, jax.Array] = dataclasses.field(default_factory=dict)


def task_of(subject: Subject, batches: Iterable[Any], **options: Any) -> dict[str, Any]:
    """What a journal belongs to, as JSON values."""
    targets = {t.path: f"{t.rule.scheme} {t.use} {t.rule.k_pieces}" for t in subject.targets.values()}
    given = {name: str(value) for name, value in options.items()}
    return {**given, "layers": targets, "params": _checksums(subject.leaves), "batches": _checksums(batches)}


def _checksums(tree: Any) -> list[int]:
    return [int(sum_) for sum_ in jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves(tree)])]


@jax.jit
def _checksum(a: Any) -> jax.Array:
    """Its bytes times odd numbers that grow with their place, summed modulo 2^32, where the array lies."""
    a = jnp.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a)
    bits = a.astype(jnp.uint8) if a.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(a, jnp.uint8)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 2
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (place + 1), dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True)
class Journal:
    """Stages by their number.

    Attributes:
      folder: holds one folder a stage.
      task: of `task_of`.
    """

    folder: Path
    task: Mapping[str, Any]

    def count(self) -> int:
        """How many stages there are, from the first on."""
        number = 0
        while self._place(number).exists():
            number += 1
        return number

    def read(self, number: int, units: Collection[Unit]) -> Done:
        """A stage that is there.

        Args:
          number: of the stage.
          units: what it should hold.

        Raises:
          CalibrationError: one of another task.
          CheckpointError, QTensorError: a folder that somebody has changed.
        """
        place = self._place(number)
        files = CheckpointFiles.open(place)
        theirs = files.config.get("task", {})
        other = [name for name, value in self.task.items() if theirs.get(name) != value]
        records = files.config.get("weights", {})
        if other or records.keys() != {_name(unit) for unit in units}:
            raise CalibrationError(
                f"{place}: is of another calibration, with other {', '.join(other) or 'layers'}; choose another folder "
                "for resume="
            )
        weights = {}
        for unit in units:
            name = _name(unit)
            w = validate_qtensor(from_arrays(files, name, records[name], f"{place}: {name}"), f"{place}: {name}")
            factors = f"{name}.factors"
            kept = jnp.asarray(files[factors]) if factors in files else None
            weights[unit] = (jax.tree.map(jnp.asarray, w), kept)
        norms = {int(leaf): jnp.asarray(files[f"norm.{leaf}"]) for leaf in files.config.get("norms", [])}
        earlier = ((leaf, tuple(index)) for leaf, *index in files.config.get("rows", []))
        rows = {unit: jnp.asarray(files[f"{_name(unit)}.rows"]) for unit in earlier}
        return Done(weights, norms, rows)

    def write(self, number: int, done: Done) -> None:
        """Keeps a stage.

        Raises:
          CheckpointError: it is there already, or cannot be written.
        """
        arrays: dict[str, Any] = {f"norm.{leaf}": norm for leaf, norm in done.norms.items()}
        arrays |= {f"{_name(unit)}.rows": factors for unit, factors in done.rows.items()}
        for unit, (w, factors) in done.weights.items():
            arrays |= to_arrays(w, _name(unit))
            if factors is not None:
                arrays[f"{_name(unit)}.factors"] = factors
        records = {_name(unit): to_record(w) for unit, (w, _) in done.weights.items()}
        rows = [[leaf, *index] for leaf, index in done.rows]
        config = {"task": dict(self.task), "weights": records, "norms": list(done.norms), "rows": rows}
        write_folder(self._place(number), tensors=arrays, config=config)

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:05d}"


def _name(unit: Unit) -> str:
    leaf, index = unit
    return ".".join(map(str, (leaf, *index)))
