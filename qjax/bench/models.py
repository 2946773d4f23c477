"""Models to measure: published geometries with random weights, made at their size on the device, or a folder's own."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
import qjax.nnx
from qjax.bench.operands import random_array, random_weight
from qjax.errors import QJaxError
from qjax.models import Llama, LlamaConfig, merge
from qjax.models.llama import RMSNorm
from qjax.models.llama_weights import leaf_modules, partition_spec
from qjax.models.rope import Rope
from qjax.nnx import QLinear
from qjax.qtensor import QTensor
from qjax.schemes import Scheme
from qjax.sharding import shard


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, theta: float
) -> LlamaConfig:
    return LlamaConfig(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        rope=Rope("default", theta, hidden // heads, 8192),
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )


# From the config.json of Llama 2 (7B, 13B, 70B), Llama 3 (8B) and Llama 3.2 (1B, whose head is tied to its embedding).
GEOMETRIES = {
    "llama-3.2-1b": dataclasses.replace(_llama(16, 2048, 8192, 32, 8, 128256, 5e5), tie_word_embeddings=True),
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32, 32000, 1e4),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, 128256, 5e5),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40, 32000, 1e4),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8, 32000, 1e4),
}


def model_of(name: str, scheme: Scheme | None, dtype: Any, mesh: Mesh | None = None) -> Llama:
    """A model whose layers are of a scheme (None: in `dtype`, as head and embedding are), its projections merged.

    Args:
      name: a key of `GEOMETRIES`, or a checkpoint folder, which stays what it is where there is no scheme.
      scheme: of the layers.
      dtype: of activations, and of random dense weights.
      mesh: cuts the model as `qjax.load` does.

    Raises:
      QJaxError: neither a geometry nor a folder.
    """
    if name in GEOMETRIES:
        return merge(_random_model(GEOMETRIES[name], scheme, dtype, mesh))
    check_name(name)
    model = qjax.load(name, dtype=dtype, mesh=mesh)
    if scheme is not None:
        qjax.nnx.quantize(model, scheme)
    return merge(model)


def check_name(name: str) -> None:
    """Raises QJaxError for what is neither a geometry nor a folder."""
    if name not in GEOMETRIES and not Path(name).is_dir():
        raise QJaxError(f"{name!r} is neither a folder nor one of {', '.join(GEOMETRIES)}")


def _random_model(config: LlamaConfig, scheme: Scheme | None, dtype: Any, mesh: Mesh | None) -> Llama:
    """Random codes or values of about the size that trained ones have."""
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    for index, (parent, attribute, path, module) in enumerate(list(leaf_modules(model))):
        key = jax.random.fold_in(jax.random.key(0), index)
        spec = PartitionSpec() if mesh is None or isinstance(module, RMSNorm) else partition_spec(path, mesh)
        place = functools.partial(_place, mesh=mesh, spec=spec)
        if isinstance(module, RMSNorm):
            module.weight.set_value(place(jnp.ones(module.weight.shape, dtype)))
        elif isinstance(module, nnx.Embed):
            module.embedding.set_value(place(random_array(key, module.embedding.shape, dtype)))
        elif scheme is None or path == "lm_head":
            k, n = module.kernel.shape
            module.kernel.set_value(place(random_array(key, (k, n), dtype, k**-0.5)))
        else:
            k, n = module.kernel.shape
            weight = place(random_weight(key, scheme, n, k))
            setattr(parent, attribute, QLinear.from_qtensor(weight, dtype=dtype))
    return model


def _place(weight: Any, *, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    if mesh is None:
        return weight
    if isinstance(weight, QTensor):
        return shard(weight, mesh, spec)
    return jax.device_put(weight, NamedSharding(mesh, spec))
