"""Hugging Face tensor names -> a filled Llama, one tensor at a time.

The model is built abstract (shapes only) and each module is filled in turn, so that memory holds
the result and one tensor of the file. What a Linear's or an embedding's weights look like in the
file is the reader's business: the dense reader is here, those of quantized formats plug in.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qjax.checkpoints.files import CheckpointFiles
from qjax.errors import CheckpointError, ShardingError
from qjax.models.llama import Llama, RMSNorm
from qjax.models.llama_config import LlamaConfig

FLOATS = ("float32", "float16", "bfloat16")

# Tensors that are computed here, whatever the file says.
COMPUTED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

# Module path -> how its kernel [in, out] (an embedding: [vocabulary, features]) is cut over a mesh.
# Only the axes that the mesh has apply.
PARTITIONS = (
    (r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)|lm_head", ("fsdp", "model")),
    (r".*\.(o_proj|down_proj)|embed_tokens", ("model", "fsdp")),
    (r".*", ()),
)


@dataclass(frozen=True)
class LayerWeights:
    """What a reader returns for a Linear or an embedding.

    Attributes:
      kernel: a host array `[in, out]` (an embedding's: `[features, vocabulary]`), or a QTensor of
        that logical shape, already on its devices.
      bias: a host array `[out]`, or None.
    """

    kernel: Any
    bias: np.ndarray | None = None


# Takes a module's tensor name without its last part, "model.layers.0.mlp.up_proj".
type Reader = Callable[[str], LayerWeights]

# Takes a host array and the name that errors give it, to its devices.
type Put = Callable[[np.ndarray, str], jax.Array]


def dense_reader(files: CheckpointFiles) -> Reader:
    """Reads `.weight` `[out, in]` and `.bias` as they are, and refuses any other tensor there."""

    def read(prefix: str) -> LayerWeights:
        known = (f"{prefix}.weight", f"{prefix}.bias")
        unknown = [name for name in files if name.startswith(f"{prefix}.") and name not in known]
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
      mesh: places each dense weight by `partition_spec`; one device without it.
      reader: reads the weights of each Linear and embedding; plain tensors by default.
      ignored: patterns of tensor names that the caller has dealt with.

    Raises:
      CheckpointError: the config lacks something; a tensor is missing, unexpected, or has another
        shape or dtype than the config asks for.
      NotImplementedError: a model of another type.
      ShardingError: an axis of the mesh does not divide a weight.
    """
    where = str(files.path / "config.json")
    config = LlamaConfig.from_hf(files.config, files.json("generation_config.json"), where=where)
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    read = dense_reader(files) if reader is None else reader
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    leaves = list(_leaf_modules(model))
    _check_names(files, leaves, config, ignored)
    for parent, attribute, path, module in leaves:
        prefix = tensor_prefix(path)
        put, where = _put(mesh, path), f"{files.path}: {prefix}"
        if isinstance(module, RMSNorm):
            weight = _floats(files, f"{prefix}.weight")
            _check_shape(f"{where}.weight", weight.shape, module.weight.shape)
            module.weight.set_value(put(weight, where))
        else:
            _fill_layer(parent, attribute, read(prefix), put, where)
    logging.info("loaded %s: %s, %d layers", files.path, config.model_type, len(model.layers))
    return model


def tensor_prefix(path: str) -> str:
    """The name in the file of the module at `path`, such as "layers.0.mlp.up_proj"."""
    return path if path == "lm_head" else f"model.{path}"


def partition_spec(path: str, mesh: Mesh) -> PartitionSpec:
    """How the kernel of the module at `path` is cut over the axes "model" and "fsdp" of `mesh`."""
    axes = next(axes for pattern, axes in PARTITIONS if re.fullmatch(pattern, path))
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))


def _leaf_modules(model: Llama) -> Iterator[tuple[nnx.Module, str, str, nnx.Module]]:
    """(parent, attribute, path, module) of every module that has weights of its own."""
    modules = {path: module for path, module in nnx.iter_modules(model)}
    for path, module in modules.items():
        if isinstance(module, nnx.Linear | nnx.Embed | RMSNorm):
            *above, attribute = path
            yield modules[tuple(above)], attribute, ".".join(map(str, path)), module


def _check_names(
    files: CheckpointFiles,
    leaves: list[tuple[nnx.Module, str, str, nnx.Module]],
    config: LlamaConfig,
    ignored: Iterable[str],
) -> None:
    """Refuse tensors that belong to no module: dropping weights would be a silent wrong answer."""
    prefixes = {tensor_prefix(path) for _, _, path, _ in leaves}
    tied = (r"lm_head\.weight",) if config.tie_word_embeddings else ()
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


def _fill_layer(parent: nnx.Module, attribute: str, weights: LayerWeights, put: Put, where: str) -> None:
    """Fill the Linear or Embed `parent.attribute`, or put a quantized module in its place."""
    module = getattr(parent, attribute)
    embedding = isinstance(module, nnx.Embed)
    param = module.embedding if embedding else module.kernel
    shape = tuple(weights.kernel.shape)
    _check_shape(f"{where}.weight", shape[::-1], param.shape if embedding else param.shape[::-1])
    bias = None if embedding else module.bias
    if (bias is None) != (weights.bias is None):
        asked = "no bias" if bias is None else f"one of shape {list(bias.shape)}"
        found = "none" if weights.bias is None else f"one of shape {list(weights.bias.shape)}"
        raise CheckpointError(f"{where}.bias: the config asks for {asked}, the file has {found}")
    if bias is not None:
        _check_shape(f"{where}.bias", weights.bias.shape, bias.shape)
    if not isinstance(weights.kernel, np.ndarray):
        setattr(parent, attribute, _quantized_module(module, weights))
        return
    param.set_value(put(weights.kernel.T if embedding else weights.kernel, where))
    if bias is not None:
        bias.set_value(put(weights.bias, where))


def _quantized_module(module: nnx.Linear | nnx.Embed, weights: LayerWeights) -> nnx.Module:
    import qjax.nnx

    if isinstance(module, nnx.Embed):
        return qjax.nnx.QEmbed.from_qtensor(weights.kernel, dtype=module.dtype)
    bias = None if weights.bias is None else jnp.array(weights.bias)
    return qjax.nnx.QLinear.from_qtensor(weights.kernel, bias=bias, dtype=module.dtype)


def _check_shape(where: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise CheckpointError(f"{where}: shape {list(got)}; the config asks for {list(expected)}")


def _put(mesh: Mesh | None, path: str) -> Put:
    """How arrays of the module at `path` reach the devices; one axis is the output's (a bias)."""
    if mesh is None:
        return lambda array, where: jnp.array(array)
    spec = partition_spec(path, mesh)

    def put(array: np.ndarray, where: str) -> jax.Array:
        own = spec if array.ndim == 2 else PartitionSpec(*spec[1:])
        for size, axis in zip(array.shape, own, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ShardingError(
                    f"{where}: shape {list(array.shape)}: {size} cannot be cut into "
                    f"{mesh.shape[axis]} equal parts over mesh axis {axis!r}"
                )
        return jax.device_put(np.ascontiguousarray(array), NamedSharding(mesh, own))

    return put
