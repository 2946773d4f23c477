"""A whole program compiled for a GPU that is not there, and the answer: what scripts that do so have in common.

A test starts such a child by `aot.compiler.answer_of`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from aot.compile import mesh_of, steps_of

from qjax.devices import Device

OPTIONS = {"xla_gpu_graph_min_graph_size": 1, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}


def compiled(device: Device, trace: Callable[[Callable[[Any], Any]], jax.stages.Traced]) -> dict[str, Any]:
    """Steps, scratch memory and HLO of a program.

    Args:
      trace: traces it, and is given a function that places a tree of shapes on the device.
    """
    mesh = mesh_of(device)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole))
    with tempfile.TemporaryDirectory() as folder, jax.default_device(mesh.devices.flat[0]):
        lowered = trace(place).lower(lowering_platforms=("cuda",))
        done = lowered.compile(compiler_options={**OPTIONS, "xla_dump_to": folder})
        steps = [dataclasses.asdict(step) for step in steps_of(Path(folder))]
    return {"steps": steps, "scratch": done.memory_analysis().temp_size_in_bytes, "hlo": done.as_text()}


def answer(make: Callable[[], Any]) -> None:
    """Prints what `make` gives as JSON, and nothing that libraries print meanwhile."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        json.dump(make(), answers)
