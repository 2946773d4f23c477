"""A block of decode steps, compiled for one H200 and for two that are not there: prints their steps as JSON.

A child process of `test_decode_aot.py`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

import dataclasses
import functools
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from aot.compile import description, steps_of
from aot.whole_program import OPTIONS, answer, compiled
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import qjax
from qjax import product, quantize_call, sharding
from qjax.bench import models
from qjax.devices import find_device
from qjax.models import collectives
from qjax.models.generate import decode
from qjax.qtensor import QTensor
from qjax.schemes import W4A16

# The axis that is cut: of kernels [in, out], of the table [vocabulary, features].
_CUT = {"o_proj": 0, "down_proj": 0, "embed_tokens": 0, "qkv_proj": 1, "gate_up_proj": 1, "lm_head": 1}

decode_attention, merge = (sys.modules[f"qjax.models.{name}"] for name in ("decode_attention", "merge"))


def decode_steps(batch: int) -> dict[str, Any]:
    """Two layers of Llama 2 7B in int4 under a small head, eight tokens."""
    device = find_device("h200")
    whole_model = models.GEOMETRIES["llama-2-7b"]
    models.GEOMETRIES["two layers"] = dataclasses.replace(whole_model, num_hidden_layers=2, vocab_size=1024)

    def trace(place: Callable[[Any], Any]) -> jax.stages.Traced:
        model = nnx.eval_shape(lambda: models.model_of("two layers", W4A16(), jnp.bfloat16))
        definition, state = nnx.split(model)
        cache = jax.eval_shape(lambda: model.empty_cache(batch, 64))
        tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return decode.trace(definition, place(state), place(tokens), place(cache), None, 1, count=8)

    with qjax.use(device=device):
        return compiled(device, trace)


def steps_on_two(batch: int) -> dict[str, Any]:
    """The same, cut over two: collectives by their names, and the HLO."""
    device = find_device("h200")
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description(device), topology="1x1x2"
    )
    mesh = topologies.make_mesh(described, (2,), ("model",))
    # What the partitioner traces is to be for that device, too.
    nowhere = AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)
    for module in (product, quantize_call, decode_attention):
        module.off_mesh = functools.partial(_on, nowhere)  # type: ignore[attr-defined]
    merge._shares = lambda kernel: 2  # type: ignore[attr-defined]
    whole_model = models.GEOMETRIES["llama-2-7b"]
    models.GEOMETRIES["two layers"] = dataclasses.replace(whole_model, num_hidden_layers=2)

    def put(spec: PartitionSpec, a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    def placed(path: Any, leaf: Any) -> Any:
        axis = next((axis for name, axis in _CUT.items() if f"'{name}'" in jax.tree_util.keystr(path)), None)
        spec = PartitionSpec(*("model" if i == axis else None for i in range(leaf.ndim)))
        return jax.tree.map(put, sharding.specs(leaf, spec), leaf) if isinstance(leaf, QTensor) else put(spec, leaf)

    with qjax.use(device=device):
        model = nnx.eval_shape(lambda: models.model_of("two layers", W4A16(), jnp.bfloat16))
        for _, module in nnx.iter_modules(model):
            if isinstance(module, merge.MergedLinear):
                module.on_mesh = True
        definition, state = nnx.split(model)
        state = jax.tree_util.tree_map_with_path(placed, state, is_leaf=lambda a: isinstance(a, QTensor))
        cache = jax.eval_shape(lambda: model.empty_cache(batch, 64))
        cache = jax.tree.map(lambda a: put(PartitionSpec(*(None, "model")[: a.ndim] if a.ndim > 1 else ()), a), cache)
        tokens = put(PartitionSpec(), jax.ShapeDtypeStruct((batch,), jnp.int32))
        traced = decode.trace(definition, state, tokens, cache, None, 1, count=8)
        lowered = traced.lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {**OPTIONS, **collectives.OPTIONS, "xla_dump_to": folder}
        hlo = lowered.compile(compiler_options=options).as_text()
        steps = [dataclasses.asdict(step) for step in steps_of(Path(folder))]
    names = "all-reduce|all-gather|all-to-all|collective-permute"
    return {"collectives": re.findall(rf"= (.*) ({names})(?:-start)?\(", hlo), "steps": steps}


def _on(mesh: AbstractMesh, f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return f(*args)

    return run


if __name__ == "__main__":
    answer(lambda: {"one": decode_steps(1), "two": steps_on_two(1)})
