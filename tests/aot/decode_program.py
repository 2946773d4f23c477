"""A block of decode steps, compiled for an H200 that is not there: prints its steps as JSON.

A child process of `test_decode_aot.py`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from aot.compile import mesh_of, steps_of
from flax import nnx

import qjax
from qjax.bench import models
from qjax.devices import find_device
from qjax.models.generate import decode
from qjax.schemes import W4A16

OPTIONS = {"xla_gpu_graph_min_graph_size": 1, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}


def compiled(batch: int) -> dict[str, Any]:
    """Two layers of Llama 2 7B in int4 under a small head, eight tokens."""
    device = find_device("h200")
    mesh = mesh_of(device)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole))
    whole_model = models.GEOMETRIES["llama-2-7b"]
    models.GEOMETRIES["two layers"] = dataclasses.replace(whole_model, num_hidden_layers=2, vocab_size=1024)
    with qjax.use(device=device), tempfile.TemporaryDirectory() as folder, jax.default_device(mesh.devices.flat[0]):
        model = nnx.eval_shape(lambda: models.model_of("two layers", W4A16(), jnp.bfloat16))
        definition, state = nnx.split(model)
        cache = jax.eval_shape(lambda: model.empty_cache(batch, 64))
        tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
        traced = decode.trace(definition, place(state), place(tokens), place(cache), None, 1, count=8)
        done = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options={**OPTIONS, "xla_dump_to": folder})
        steps = [dataclasses.asdict(step) for step in steps_of(Path(folder))]
        return {"steps": steps, "hlo": done.as_text()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(compiled(1), answers)
