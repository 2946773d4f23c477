"""`qjax.load`: a checkpoint folder -> a model whose quantized layers hold QTensors.

The folder's `quantization_config` names its format; a row of `READERS` reads it. What a format gives is made ready
here, once for all formats: activations as asked, every array checked, then placed.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from qjax import devices, sharding
from qjax.checkpoints import native
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.native import TensorReader
from qjax.errors import CheckpointError, QTensorError, SchemeError
from qjax.qtensor import QTensor, validate_qtensor
from qjax.schemes import Scheme, parse_scheme

if TYPE_CHECKING:  # imported when called: flax.nnx takes longer to import than all of qjax
    from qjax.models.llama import Llama
    from qjax.models.llama_weights import LayerWeights, Reader

# quant_method of config.json -> what reads a folder in that format.
READERS: dict[str, Callable[[CheckpointFiles], TensorReader]] = {native.METHOD: native.reader}

# (constructor of a weight-only scheme, x) -> constructor of the scheme with the same weights that makes x so.
WITH_ACTIVATIONS = {("w8a16", "int8"): "w8a8_int8", ("w4a16", "int8"): "w4a8_int8", ("fp8", "fp8"): "w8a8_fp8"}
WEIGHT_ONLY = {name: weights for (weights, _), name in WITH_ACTIVATIONS.items()}

ACTIVATIONS = ("checkpoint", "none", *dict.fromkeys(x for _, x in WITH_ACTIVATIONS))


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    activations: str = "checkpoint",
    dtype: DTypeLike | None = None,
) -> "Llama":
    """Reads a Llama, Mistral, Qwen2 or Qwen3 folder: config.json and safetensors; no tokenizer is needed.

    Args:
      path: a local folder, dense or in a quantized format of `READERS`.
      mesh: places every weight by `qjax.models.llama_weights.PARTITIONS`; one device without it.
      activations: how x is quantized on its way into quantized layers: "checkpoint" as the folder says, "none" not at
        all, "int8" or "fp8" (dynamic, a scale a token) where a scheme with the folder's weights has it.
      dtype: of activations; by default what the device's tensor cores multiply, bfloat16 rather than float16, and
        float32 where it has none (a CPU).

    Raises:
      CheckpointError: the folder is malformed: a file, its config, an array's shape, dtype or values; a format that is
        not known here.
      SchemeError: activations that do not exist, or that the folder's weights cannot meet.
      NotImplementedError: a model of another family.
      ShardingError: a mesh that cuts a group, or does not divide a weight.
    """
    from qjax.models.llama_weights import load_llama

    if activations not in ACTIVATIONS:
        raise SchemeError(f"activations={activations!r}; allowed: {', '.join(ACTIVATIONS)}")
    files = CheckpointFiles.open(path)
    stored = tensor_reader(files)
    if stored is None and activations not in ("checkpoint", "none"):
        raise SchemeError(f"{files.path}: activations={activations!r} are for quantized weights; these are dense")
    reader = None if stored is None else _layer_reader(files, stored, activations, mesh)
    if dtype is None:
        dtype = devices.compute_dtype(devices.current())
    return load_llama(files, dtype=dtype, mesh=mesh, reader=reader)


def tensor_reader(files: CheckpointFiles) -> TensorReader | None:
    """The reader of a folder's format; None where it is dense.

    Raises:
      CheckpointError: naming the format and those that are known.
    """
    config = files.config.get("quantization_config")
    if config is None:
        return None
    where = f"{files.path}/config.json: quantization_config"
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is {type(config).__name__}; expected an object")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(f"{where}: quant_method={method!r}; known: {', '.join(READERS)}")
    return READERS[method](files)


def _layer_reader(files: CheckpointFiles, stored: TensorReader, activations: str, mesh: Mesh | None) -> "Reader":
    """Reads Linears and embeddings: quantized ones checked and placed, others as the file has them."""
    from qjax.models.llama_weights import LayerWeights, dense_reader

    dense = dense_reader(files)

    def read(prefix: str) -> "LayerWeights":
        found = stored(prefix)
        if found is None:
            return dense(prefix)
        kernel, names = found
        bias = f"{prefix}.bias"
        unknown = [name for name in files if name.startswith(f"{prefix}.") and name not in (*names, bias)]
        if unknown:
            raise CheckpointError(f"{files.path}: unexpected {', '.join(unknown)}; {prefix} is {', '.join(names)}")
        where = f"{files.path}: {prefix}.weight"
        kernel = checked(with_activations(kernel, activations, where), where)
        return LayerWeights(_placed(kernel, prefix, mesh, where), files[bias] if bias in files else None)

    return read


def with_activations(w: QTensor, activations: str, where: str) -> QTensor:
    """The weight under the scheme that treats x as asked; see `load`."""
    scheme = w.scheme
    wanted = {"int8": "int8", "fp8": "e4m3", "none": None}.get(activations)
    has = scheme.activation.format if scheme.activation else None
    if activations == "checkpoint" or has == wanted:
        return w
    name, _, options = scheme.spec.partition(":")
    weights = WEIGHT_ONLY.get(name, name)
    target = weights if wanted is None else WITH_ACTIVATIONS.get((weights, activations))
    if target is None or (wanted is None and name not in WEIGHT_ONLY):
        pairs = ", ".join(f"{x} with {name}" for name, x in WITH_ACTIVATIONS)
        raise SchemeError(f"{where}: no scheme is {weights} with activations={activations!r}; there are {pairs}")
    kept = [option for option in options.split(",") if option and not option.startswith(("activation=", "mode="))]
    twin: Scheme = parse_scheme(f"{target}:{','.join(kept)}")
    scheme = dataclasses.replace(scheme, spec=twin.spec, activation=twin.activation)
    return dataclasses.replace(w, scheme=scheme, act_scale=None)


def checked(w: QTensor, where: str) -> QTensor:
    """A QTensor as a file has it, on the device, if it is a right one.

    Raises:
      CheckpointError: arrays that disagree in shape or dtype; NaN or infinity in one; a static scale of x that is
        missing; an order of inputs that is none.
    """
    try:
        validate_qtensor(w, where)
    except QTensorError as error:
        raise CheckpointError(str(error)) from error
    if w.scheme.activation is not None and w.scheme.activation.mode == "static" and w.act_scale is None:
        raise CheckpointError(f"{where}: {w.scheme} has a static scale of x, and the folder has no {where}.act_scale")
    if w.input_perm is not None:
        order = np.sort(np.asarray(w.input_perm), axis=-1)
        if not np.array_equal(order, np.broadcast_to(np.arange(w.in_features), order.shape)):
            raise CheckpointError(f"{where}.input_perm is no permutation of 0 to {w.in_features - 1}")
    w = jax.tree.map(jnp.asarray, w)
    for field, array in native.to_arrays(w, where).items():
        if jnp.issubdtype(array.dtype, jnp.floating) and (bad := int(_count_bad(array))):
            raise CheckpointError(f"{field}: {bad} of {array.size} values are NaN or infinite")
    return w


@jax.jit
def _count_bad(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array.astype(jnp.float32)))


def _placed(w: QTensor, prefix: str, mesh: Mesh | None, where: str) -> QTensor:
    from qjax.models.llama_weights import partition_spec

    if mesh is None:
        return w
    path = prefix.removeprefix("model.")
    spec: Any = partition_spec(path, mesh)
    if path == "embed_tokens":  # partitioned as [vocabulary, features]; its kernel is the transpose
        spec = PartitionSpec(*reversed(spec))
    return sharding.shard(w, mesh, spec, where=where)
