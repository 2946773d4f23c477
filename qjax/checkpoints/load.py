"""`qjax.load`: a checkpoint folder -> a model whose quantized layers hold QTensors.

`qjax.checkpoints.detect` finds who reads the folder's format. What a reader gives is made ready here, once for all
formats: activations as asked, every array checked, then placed.
"""

import os
import re
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from qjax import devices, sharding
from qjax.checkpoints import detect, native
from qjax.checkpoints.activations import CHOICES, with_activations
from qjax.checkpoints.buffers import default_platform, placed, put, ready
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.finite import count_bad
from qjax.checkpoints.fit import fitted
from qjax.checkpoints.hub import local_folder
from qjax.checkpoints.source import Source
from qjax.errors import CheckpointError, QTensorError, SchemeError
from qjax.qtensor import QTensor, validate_qtensor

if TYPE_CHECKING:  # imported when called: flax.nnx takes longer to import than all of qjax
    from qjax.models.llama import Llama
    from qjax.models.llama_weights import LayerWeights, Reader


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    activations: str = "checkpoint",
    dtype: DTypeLike | None = None,
) -> "Llama":
    """Reads a Llama, Mistral, Qwen2, Qwen3 or Gemma folder: config.json and safetensors; no tokenizer is needed.

    Args:
      path: a local folder, or a name on Hugging Face's hub; dense or in a format of `qjax.checkpoints.detect.READERS`.
      mesh: places every weight by `qjax.models.llama_weights.PARTITIONS`, with a warning where it has none of their
        axes and each device gets a copy of all; one device without it.
      activations: how x is quantized on its way into quantized layers: "checkpoint" as the folder says, "none" not at
        all, "int8" or "fp8" (dynamic, a scale a token) where a scheme with the folder's weights has it.
      dtype: of activations; by default what the device's tensor cores multiply, bfloat16 rather than float16, and
        float32 where it has none (a CPU).

    Raises:
      CheckpointError: the folder is malformed: a file, its config, an array's shape, dtype or values; a format that is
        not known here.
      SchemeError: activations that do not exist, or that the folder's weights cannot meet.
      NotImplementedError: a model of another family.
      ShardingError: a mesh that does not divide a weight, or that cuts a group of a folder in QJAX's own format; groups
        of other formats are made smaller instead, their scales repeated.
    """
    from qjax.models.llama_weights import load_llama

    if activations not in CHOICES:
        raise SchemeError(f"activations={activations!r}; allowed: {', '.join(CHOICES)}")
    files, opened = detect.opened(local_folder(path))
    if opened is None and activations not in ("checkpoint", "none"):
        raise SchemeError(f"{files.path}: activations={activations!r} are for quantized weights; these are dense")
    if mesh is not None:
        _warn_if_copied(mesh)
    reader = None if opened is None else _layer_reader(files, opened, activations, mesh)
    if dtype is None:
        dtype = devices.compute_dtype(devices.current())
    ignored = () if opened is None else opened.beside
    model = load_llama(files, dtype=dtype, mesh=mesh, reader=reader, ignored=ignored)
    model.notes = (*(() if opened is None else opened.notes), *model.notes)
    return model


def _warn_if_copied(mesh: Mesh) -> None:
    from qjax.models.llama_weights import PARTITIONS

    known = sorted({axis for _, axes in PARTITIONS for axis in axes})
    if mesh.size > 1 and not set(known) & set(mesh.axis_names):
        logging.warning(
            "the mesh has axes %s and none of %s, over which weights are cut: each of its %d devices gets all of them",
            ", ".join(mesh.axis_names), ", ".join(known), mesh.size,
        )  # fmt: skip


def _layer_reader(files: CheckpointFiles, opened: Source, activations: str, mesh: Mesh | None) -> "Reader":
    """Reads Linears and embeddings: quantized ones checked, and placed where there is a mesh; others as in the file."""
    from qjax.models.llama_weights import LayerWeights, dense_reader

    dense = dense_reader(files)

    def read(prefix: str) -> "LayerWeights":
        found = opened.read(prefix)
        if found is None:
            return dense(prefix)
        kernel, names = found
        bias = f"{prefix}.bias"
        others = (name for name in files.names_in(prefix) if name not in (*names, bias))
        unknown = [name for name in others if not any(re.fullmatch(known, name) for known in opened.beside)]
        if unknown:
            raise CheckpointError(f"{files.path}: unexpected {', '.join(unknown)}; {prefix} is {', '.join(names)}")
        where = f"{files.path}: {prefix}.weight"
        kernel = checked(with_activations(kernel, activations, where), where)
        if mesh is not None:
            kernel = _on_mesh(kernel, prefix, mesh, where, opened)
        return LayerWeights(kernel, files[bias] if bias in files else None)

    return read


def checked(w: QTensor, where: str) -> QTensor:
    """A QTensor as a reader gives it, if it is a right one: arrays of the host, or those that are still to be made.

    Raises:
      CheckpointError: arrays that disagree in shape or dtype; NaN or infinity in one; a static scale of x that is
        missing; an order of inputs that is none.
    """
    try:
        validate_qtensor(w, where)
    except QTensorError as error:
        raise CheckpointError(str(error)) from error
    if w.scheme.is_static and w.act_scale is None:
        raise CheckpointError(f"{where}: {w.scheme} has a static scale of x, and the folder has no {where}.act_scale")
    if w.input_perm is not None:
        order = np.sort(np.asarray(w.input_perm), axis=-1)
        if not np.array_equal(order, np.broadcast_to(np.arange(w.in_features), order.shape)):
            raise CheckpointError(f"{where}.input_perm is no permutation of 0 to {w.in_features - 1}")
    for field, array in native.to_arrays(w, where).items():
        if isinstance(array, np.ndarray) and (bad := count_bad(array)):
            raise CheckpointError(f"{field}: {bad} of {array.size} values are NaN or infinite")
    return w


def on_device(w: QTensor) -> QTensor:
    """A checked QTensor on the default device."""
    platform = default_platform()
    found: QTensor = put(jax.tree.map(lambda array: ready(array, platform), w))
    return found


def _on_mesh(w: QTensor, prefix: str, mesh: Mesh, where: str, opened: Source) -> QTensor:
    from qjax.models.llama_weights import partition_spec

    name = prefix.rpartition(".")[2]
    spec: Any = partition_spec(name if name in ("embed_tokens", "lm_head") else prefix, mesh)
    if name == "embed_tokens":  # partitioned as [vocabulary, features]; its kernel is the transpose
        spec = PartitionSpec(*reversed(spec))
    if not opened.ours:
        k, n = (1 if axis is None else mesh.shape[axis] for axis in spec)
        w = fitted(w, {"n": n, "k": k})
    made: QTensor = jax.tree.map(placed, w, sharding.shardings(w, mesh, spec, where=where))
    return made
