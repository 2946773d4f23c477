"""A block of decode steps, compiled for an H200 that is not there: prints its steps as JSON.

A child process of `test_decode_aot.py`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from aot.whole_program import answer, compiled
from flax import nnx

import qjax
from qjax.bench import models
from qjax.devices import find_device
from qjax.models.generate import decode
from qjax.schemes import W4A16


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


if __name__ == "__main__":
    answer(lambda: decode_steps(1))
