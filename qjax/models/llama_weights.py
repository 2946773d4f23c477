"""Hugging Face tensor names -> a filled Llama, one tensor at a time.

The model is built abstract (shapes only) and each module is filled in turn, so that memory holds
the result and one tensor of the file. What a Linear's or an embedding's weights look like in the
file is the reader's business: the dense reader is here, those of quantized formats plug in.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qjax.checkpoints.ahead import ReadAhead, in_order
from qjax.checkpoints.buffers import default_platform, placed, put, ready
from qjax.checkpoints.files import CheckpointFiles
from qjax.errors import CheckpointError, ShardingError
from qjax.models.llama import Llama, RMSNorm
from qjax.models.llama_config import LlamaConfig
from qjax.models.tensor_names import VISION, TensorNames, names_in, text_config, vision_tensors
from qjax.progress import track
from qjax.qtensor import QTensor

FLOATS = ("float32", "float16", "bfloat16")

# Tensors that are computed here, whatever the file says.
COMPUTED = (r"(.*\.)?rotary_emb\.inv_freq",)

# Module path -> the mesh axes that cut its kernel [in, out], or embedding [vocabulary, features].
# Only axes that the mesh has apply.
PARTITIONS = (
    (r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)|lm_head", ("fsdp", "model")),
    (r".*\.(o_proj|down_proj)|embed_tokens", ("model", "fsdp")),
)


@dataclass(frozen=True)
class LayerWeights:
    """What a reader returns for a Linear or an embedding.

    Attributes:
      kernel: a host array `[in, out]` (an embedding's: `[features, vocabulary]`), or a QTensor with K = in and N = out,
        on its devices where there is a mesh; else its arrays may be the host's, or `qjax.checkpoints.buffers.Deferred`.
      bias: a host array `[out]`, or None.
    """

    kernel: np.ndarray | QTensor
    bias: np.ndarray | None = None


# Takes a module's tensor name without its last part, "model.layers.0.mlp.up_proj". Called by several threads.
type Reader = Callable[[str], LayerWeights]

# A module with weights of its own: (parent, attribute in it, path, module).
type Leaf = tuple[nnx.Module, str, str, nnx.Linear | nnx.Embed | RMSNorm]


def dense_reader(files: CheckpointFiles) -> Reader:
    """Reads `.weight` `[out, in]` and `.bias` as they are, and refuses any other tensor there."""

    def read(prefix: str) -> LayerWeights:
        known = (f"{prefix}.weight", f"{prefix}.bias")
        unknown = [name for name in files.names_in(prefix) if name not in known]
        if unknown:
            raise CheckpointError(
                f"{files.path}: unexpected {', '.join(unknown)}: an unquantized layer has {known[0]} and may have .bias"
            )
        bias = _floats(files, known[1]) if known[1] in files else None
        return LayerWeights(_floats(files, known[0]).T, bias)

    return read


def load_llama(
    files: CheckpointFiles,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    reader: Reader | None = None,
    ignored: Iterable[str] = (),
) -> Llama:
    """Build the model that `files` describes, weights in the dtype that they have there.

    Args:
      files: an opened folder.
      dtype: of activations; the checkpoint's own by default.
      mesh: cuts dense kernels by `partition_spec` and copies the rest; one device without it.
      reader: reads the weights of each Linear and embedding; plain tensors by default.
      ignored: patterns of tensor names that the caller has dealt with.

    Raises:
      CheckpointError: the config lacks something; a tensor is missing, unexpected, or has another
        shape or dtype than the config asks for.
      NotImplementedError: a model of another type.
      ShardingError: an axis of the mesh does not divide a weight.
    """
    where = str(files.path / "config.json")
    _check_layers(files, where)
    config = LlamaConfig.from_hf(files.config, files.json("generation_config.json"), where=where)
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    read = dense_reader(files) if reader is None else reader
    names = names_in(files)
    first = names.prefix("embed_tokens")
    reads_all = mesh is None or not mesh.is_multi_process  # else this process reads a part of each tensor
    with ReadAhead(files) as ahead:
        if reads_all:
            ahead.want([first])  # while the model is made
        model = Llama(config, dtype=dtype, rngs=None)
        leaves = {names.prefix(leaf[2]): leaf for leaf in leaf_modules(model)}
        if vision := vision_tensors(files) if "text_config" in files.config else []:
            model.notes = (f"{len(vision)} tensors of {vision[0].rpartition('.')[0]} and others: text alone is read",)
            ignored = (*ignored, VISION)
        _check_names(files, set(leaves), names, config, ignored)
        if reads_all:
            ahead.want([prefix for prefix in leaves if prefix != first])
        platform = default_platform() if mesh is None else None
        ready_ones = in_order(lambda prefix: _found(files, prefix, leaves[prefix][3], read, platform), leaves)
        with closing(ready_ones) as found:
            for prefix in track(list(leaves), "loading"):
                parent, attribute, path, module = leaves[prefix]
                weights = next(found)
                ahead.taken(prefix)
                setattr(parent, attribute, _filled(module, weights, mesh, path, f"{files.path}: {prefix}"))
    logging.info("loaded %s: %s, %d layers", files.path, config.model_type, len(model.layers))
    return model


def _check_layers(files: CheckpointFiles, where: str) -> None:
    """Refuses a number of layers that the file cannot hold, before anything of that length is made."""
    layers = text_config(files.config).get("num_hidden_layers")
    if type(layers) is int and layers > len(files):
        raise CheckpointError(f"{where}: num_hidden_layers={layers}, and the folder has {len(files)} tensors")


def partition_spec(path: str, mesh: Mesh) -> PartitionSpec:
    """How `PARTITIONS` cuts the kernel or embedding at `path` over the axes of `mesh`."""
    axes = next(axes for pattern, axes in PARTITIONS if re.fullmatch(pattern, path))
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))


def leaf_modules(model: Llama) -> Iterator[Leaf]:
    """Whatever has weights of its own: its owner, its name there, its path and itself."""
    modules = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        if isinstance(module, nnx.Linear | nnx.Embed | RMSNorm):
            yield modules[path[:-1]], str(path[-1]), ".".join(map(str, path)), module


def _check_names(
    files: CheckpointFiles,
    prefixes: set[str],
    names: TensorNames,
    config: LlamaConfig,
    ignored: Iterable[str],
) -> None:
    """Refuse tensors that belong to no module: dropping weights would be a silent wrong answer."""
    tied = (re.escape(f"{names.head}.weight"),) if config.tie_word_embeddings else ()
    known = re.compile("|".join((*COMPUTED, *tied, *ignored)))

    def belongs(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:n]) in prefixes for n in range(1, len(parts)))

    unexpected = [name for name in files if not belongs(name) and not known.fullmatch(name)]
    if unexpected:
        shown = ", ".join(f"{name} {list(files.shape(name))}" for name in unexpected[:6])
        raise CheckpointError(
            f"{files.path}: {len(unexpected)} tensors belong to no part of a {config.model_type} "
            f"with {config.num_hidden_layers} layers: {shown}"
        )


def _floats(files: CheckpointFiles, name: str) -> np.ndarray:
    array = files[name]
    if array.dtype.name not in FLOATS:
        raise CheckpointError(
            f"{files.path}: tensor {name!r} has dtype {array.dtype}; expected one of "
            f"{', '.join(FLOATS)} in an unquantized layer"
        )
    return array


def _found(
    files: CheckpointFiles, prefix: str, module: nnx.Linear | nnx.Embed | RMSNorm, read: Reader, platform: str | None
) -> LayerWeights:
    """What the file has for a module, in the axes of the module; for one device, of `platform`, all of it is ready."""
    where = f"{files.path}: {prefix}"
    if isinstance(module, RMSNorm):
        weights = LayerWeights(_floats(files, f"{prefix}.weight"))
        _check_shape(f"{where}.weight", weights.kernel.shape, module.weight.shape)
    else:
        weights = _checked(read(prefix), module, where)
    if isinstance(module, nnx.Embed) and not isinstance(weights.kernel, QTensor):
        weights = replace(weights, kernel=weights.kernel.T)
    if platform is None:
        return weights
    return LayerWeights(*jax.tree.map(lambda array: ready(array, platform), (weights.kernel, weights.bias)))


def _checked(weights: LayerWeights, module: nnx.Linear | nnx.Embed, where: str) -> LayerWeights:
    """The weights, if they have the shapes that the module asks for. Errors say [out, in]."""
    kernel, bias = weights.kernel, None
    if isinstance(module, nnx.Embed):
        expected = module.embedding.shape
    else:
        expected, bias = module.kernel.shape[::-1], module.bias
    if isinstance(kernel, QTensor):
        got = (kernel.out_features, kernel.in_features)
    else:
        got = kernel.shape[::-1]
    _check_shape(f"{where}.weight", got, expected)
    if bias is None and weights.bias is not None:
        if not isinstance(kernel, QTensor) or np.any(weights.bias):
            raise CheckpointError(f"{where}.bias: the config asks for no bias, the file has one")
        return replace(weights, bias=None)  # AutoGPTQ writes zeros where there is none
    if bias is not None:
        if weights.bias is None:
            raise CheckpointError(f"{where}.bias: missing; expected shape {list(bias.shape)}")
        _check_shape(f"{where}.bias", weights.bias.shape, bias.shape)
    return weights


def _check_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise CheckpointError(f"{where}: shape {list(got)}; the config asks for {list(expected)}")


def _filled(
    module: nnx.Linear | nnx.Embed | RMSNorm, weights: LayerWeights, mesh: Mesh | None, path: str, where: str
) -> nnx.Module:
    """The module with its weights, on their devices; a quantized one where the kernel is."""
    kernel, bias = _placed(module, weights, mesh, path, where)
    if isinstance(kernel, QTensor):
        assert not isinstance(module, RMSNorm)
        return _quantized_module(module, kernel, bias)
    if isinstance(module, RMSNorm):
        module.weight.set_value(kernel)
    elif isinstance(module, nnx.Embed):
        module.embedding.set_value(kernel)
    else:
        module.kernel.set_value(kernel)
        if module.bias is not None and bias is not None:
            module.bias.set_value(bias)
    return module


def _placed(module: nnx.Module, weights: LayerWeights, mesh: Mesh | None, path: str, where: str) -> tuple[Any, Any]:
    """Kernel and bias on their devices."""
    if mesh is None:
        return put((weights.kernel, weights.bias))
    spec = PartitionSpec() if isinstance(module, RMSNorm) else partition_spec(path, mesh)
    kernel, bias = weights.kernel, weights.bias
    return (
        kernel if isinstance(kernel, QTensor) else _place(kernel, mesh, spec, where),
        None if bias is None else _place(bias, mesh, PartitionSpec(*spec[1:]), where),
    )


def _quantized_module(module: nnx.Linear | nnx.Embed, kernel: QTensor, bias: jax.Array | None) -> nnx.Module:
    from qjax.nnx import QEmbed, QLinear

    if isinstance(module, nnx.Embed):
        return QEmbed.from_qtensor(kernel, dtype=module.dtype)
    return QLinear.from_qtensor(kernel, bias=bias, dtype=module.dtype)


def _place(array: np.ndarray, mesh: Mesh, spec: PartitionSpec, where: str) -> jax.Array:
    for size, axis in zip(array.shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ShardingError(
                f"{where}: shape {list(array.shape)}: {size} cannot be cut into "
                f"{mesh.shape[axis]} equal parts over mesh axis {axis!r}"
            )
    return placed(array, NamedSharding(mesh, spec))
