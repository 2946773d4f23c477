"""Attention of one token, compiled for GPUs that are not there: prints a report a case as JSON.

A child process of `test_attention_aot.py`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

import dataclasses
import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
from aot.compile import Report, compile_function

from pallas_kernels.triton.decode_attention import decode_attention
from qjax.devices import find_device

# batch, query heads, key-value heads, of how much, capacity, dtype, a coded cache's; the rest as `decode_attention`
CASES = {
    "llama-2-7b": ((1, 32, 32, 128, 1024, "bfloat16"), {}),
    "llama-3-8b": ((16, 32, 8, 128, 4096, "bfloat16"), {}),
    "gemma-2-9b": ((4, 16, 8, 256, 4096, "bfloat16"), {"softcap": 50.0, "window": 4096}),
    "odd heads": ((3, 9, 3, 80, 640, "float16"), {}),
    "many queries": ((1, 128, 4, 128, 2048, "bfloat16"), {}),
    "int8 cache": ((64, 32, 32, 128, 1024, "bfloat16", "int8"), {}),
    "int8 cache; few queries": ((64, 32, 8, 128, 1024, "bfloat16", "int8"), {}),
    "fp8 cache; own": ((64, 32, 32, 128, 1024, "bfloat16", "float8_e4m3fn"), {}),
    "many rows": ((64, 32, 32, 128, 1024, "bfloat16"), {}),
    "fp8 cache": ((64, 32, 8, 128, 1024, "bfloat16", "float8_e4m3fn"), {}),
    "float32": ((1, 32, 8, 128, 1024, "float32"), {}),
}


def compiled(case: str, device: str) -> Report:
    """What becomes of one case on one device."""
    (batch, heads, kv_heads, dim, capacity, dtype, *coded), options = CASES[case]
    shape, row = jax.ShapeDtypeStruct, find_device(device)
    token = shape((batch, (heads + 2 * kv_heads) * dim), dtype)
    angle = shape((batch, dim // 2), jnp.float32)
    cache = [shape((batch, kv_heads, capacity, dim), *coded or (dtype,))] * 2
    cache += [shape((batch, kv_heads, capacity), jnp.float32)] * 2 if coded else []
    operands = token, angle, angle, shape((batch,), jnp.int32), *cache
    run = functools.partial(decode_attention, scale=dim**-0.5, sms=row.sms, smem=row.shared.smem_block, **options)
    return compile_function(lambda o: run(*o), operands, row)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = (line.split(",") for line in sys.argv[1:])
    reports = {f"{case} {device}": compiled(case, device) for case, device in given}
    json.dump({name: dataclasses.asdict(dataclasses.replace(r, hlo="")) for name, r in reports.items()}, answers)
