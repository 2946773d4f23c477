"""QJAX's own checkpoint format: a QTensor <-> named arrays and a JSON record of what is static.

    safetensors   <module>.weight.packed, .scale, .zero_point, ...; double-quantized: .scale.packed, .scale.scale, ...
    config.json   "quantization_config": {"quant_method": "qjax", "version": 1, "tensors": {<module>: record}}

The packed order is that of `qjax.layouts`: `VERSION` grows when it, or a field's meaning, changes. A record lists its
arrays, so that one that was lost is missed. Scale and zero point keep their dtype, to the bit.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.source import Settings, TensorReader
from qjax.errors import CheckpointError, SchemeError
from qjax.qtensor import QTensor
from qjax.scheme_json import scheme_from_dict, scheme_to_dict
from qjax.schemes import Scheme

METHOD = "qjax"
VERSION = 1
MARKS = ("weight.packed",)

ARRAYS = tuple(f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static"))
DTYPES = ("float32", "float16", "bfloat16", "float64")
_SHAPES = ("k_piece", "in_shape", "out_shape", "axes")


def to_arrays(w: QTensor, name: str) -> dict[str, jax.Array]:
    """The arrays of a QTensor by the names that they have in a file, `name` being the weight's."""
    arrays: dict[str, jax.Array] = {}
    for field in ARRAYS:
        value = getattr(w, field)
        if isinstance(value, QTensor):
            arrays |= to_arrays(value, f"{name}.{field}")
        elif value is not None:
            arrays[f"{name}.{field}"] = value
    return arrays


def to_record(w: QTensor) -> dict[str, Any]:
    """What is static of a QTensor, as JSON values, and which arrays it has."""
    record: dict[str, Any] = {"scheme": scheme_to_dict(w.scheme), "dtype": w.dtype.name}
    record |= {key: list(value) for key in _SHAPES if (value := getattr(w, key)) is not None}
    record["arrays"] = [field for field in ARRAYS if getattr(w, field) is not None]
    if isinstance(w.scale, QTensor):
        record["scale"] = to_record(w.scale)
    return record


def config(tensors: Mapping[str, QTensor]) -> dict[str, Any]:
    """The `quantization_config` of a folder that holds these weights, by module."""
    records = {module: to_record(w) for module, w in tensors.items()}
    return {"quant_method": METHOD, "version": VERSION, "tensors": records}


def reader(files: CheckpointFiles, settings: Settings) -> TensorReader:
    """Reads the weights of a folder in this format.

    Raises:
      CheckpointError: another version; a record that is malformed, or one of a weight that the folder has not; from the
        reader itself, an array that is missing.
    """
    where = settings.where
    if settings.get("version") != VERSION:
        raise CheckpointError(f"{where}: version={settings.get('version')!r}; this QJAX reads {VERSION}")
    records = settings.get("tensors")
    if not isinstance(records, dict):
        raise CheckpointError(f"{where}: tensors is {type(records).__name__}; expected an object")
    for module in records:
        if f"{module}.weight.packed" not in files:
            raise CheckpointError(f"{where}: {module} is listed, and the folder has no {module}.weight.packed")

    def read(module: str) -> tuple[QTensor, tuple[str, ...]] | None:
        if module not in records:
            return None
        w = from_arrays(files, f"{module}.weight", records[module], f"{where}: {module}")
        return w, tuple(to_arrays(w, f"{module}.weight"))

    return read


def from_arrays(files: CheckpointFiles, name: str, record: Any, where: str) -> QTensor:
    """A QTensor of host arrays from its record and the arrays called `name`.*; shapes are not looked at.

    Raises:
      CheckpointError: the record is malformed (`where` names it), or an array is missing.
    """
    static = _static(record, where)
    arrays: dict[str, Any] = {}
    for field in record["arrays"]:
        nested = field == "scale" and "scale" in record
        full = f"{name}.{field}"
        arrays[field] = from_arrays(files, full, record["scale"], f"{where}.scale") if nested else files[full]
    return QTensor(**arrays, **static)


def _static(record: Any, where: str) -> dict[str, Any]:
    """The static fields of a record, each of the type that it should be."""
    known = {"scheme", "dtype", "arrays", "scale", *_SHAPES}
    if not isinstance(record, dict) or not {"scheme", "dtype", "arrays", "k_piece"} <= record.keys() <= known:
        raise CheckpointError(f"{where}: {record!r} is no record of a tensor; its keys are {', '.join(sorted(known))}")
    arrays = record["arrays"]
    if not isinstance(arrays, list) or not {"packed", "scale"} <= set(map(str, arrays)) <= set(ARRAYS):
        raise CheckpointError(f"{where}: arrays={arrays!r}; expected packed, scale and any of {', '.join(ARRAYS[2:])}")
    if record["dtype"] not in DTYPES:
        raise CheckpointError(f"{where}: dtype={record['dtype']!r}; allowed: {', '.join(DTYPES)}")
    shapes = {key: record[key] for key in _SHAPES if key in record}
    for key, value in shapes.items():
        least = 0 if key == "axes" else 1
        if not isinstance(value, list) or not all(type(i) is int and i >= least for i in value):
            raise CheckpointError(f"{where}: {key}={value!r}; expected a list of integers, at least {least}")
    if len(shapes["k_piece"]) != 2:
        raise CheckpointError(f"{where}: k_piece={shapes['k_piece']!r}; expected two integers")
    return {
        "scheme": _scheme(record["scheme"], where),
        "dtype": np.dtype(record["dtype"]),
        **{key: tuple(value) for key, value in shapes.items()},
    }


def _scheme(fields: Any, where: str) -> Scheme:
    """A stored scheme whose every field has a value that it can have."""
    try:
        return scheme_from_dict(fields)
    except SchemeError as error:
        raise CheckpointError(f"{where}: not a scheme: {error}") from error
