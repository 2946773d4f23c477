"""Programs with cuBLASLt's custom call, compiled for GPUs that are not there: prints their steps as JSON.

A child process of `test_cublaslt_aot.py`, which sets its environment: the CUDA plugin, JAX on the CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from aot.whole_program import answer, compiled

from qjax.devices import find_device
from xla_ffi.cublaslt import matmul, microscaling

M, N, K, LAYERS = 64, 2048, 2048, 6
E4M3, F32 = jnp.float8_e4m3fn, jnp.float32


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e4m3 rows and their scales, in plain JAX."""
    scale = jnp.max(jnp.abs(x.astype(F32)), axis=1, keepdims=True) / 448
    return (x / scale).astype(E4M3), scale


def layer(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """One product with the quantization of x in front of it."""
    codes, x_scale = quantize(x)
    return matmul.matmul(codes, w, scale, x_scale=x_scale, group=K)


def scanned(x: jax.Array, ws: jax.Array, scales: jax.Array) -> jax.Array:
    """Layers stacked in one array, one after another."""
    return jax.lax.scan(lambda x, w: (layer(x, *w), None), x, (ws, scales))[0]


def listed(x: jax.Array, ws: list[jax.Array], scales: list[jax.Array]) -> jax.Array:
    """The same, each layer in arrays of its own."""
    for w, scale in zip(ws, scales, strict=True):
        x = layer(x, w, scale)
    return x


def blocks(x: jax.Array, w: jax.Array, x_scale: jax.Array, scale: jax.Array) -> jax.Array:
    """x in blocks of 1 x 128 by w in blocks of 128 x 128."""
    return matmul.matmul(x, w, scale, x_scale=x_scale, group=128, block_n=128)


def biased(x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """One product with bias and activation, x quantized before."""
    codes, x_scale = quantize(x)
    return matmul.matmul(codes, w, scale, x_scale=x_scale, group=K, bias=bias, activation=jax.nn.relu)


def one_scale(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """One scale in all on both sides."""
    return matmul.matmul(x, w, scale, x_scale=scale, group=K, block_n=N)


def mxfp8(x: jax.Array, w: jax.Array, x_scale: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales of 32 on both sides."""
    return microscaling.matmul(x, w, scale, x_scale=x_scale)


def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


x16, w8, rows = of((M, K), jnp.bfloat16), of((N, K), E4M3), of((N, 1), F32)
e8m0 = jnp.float8_e8m0fnu
PROGRAMS: dict[str, tuple[str, Callable[..., jax.Array], tuple[Any, ...]]] = {
    "one scale, L4": ("L4", one_scale, (of((M, K), E4M3), w8, of((1, 1), F32))),
    "one scale, H200": ("H200", one_scale, (of((M, K), E4M3), w8, of((1, 1), F32))),
    "rows": ("H200", biased, (x16, w8, rows, of((N,), jnp.bfloat16))),
    "blocks": ("H200", blocks, (of((M, K), E4M3), w8, of((M, K // 128), F32), of((N // 128, K // 128), F32))),
    "stack": ("H200", jax.vmap(layer), tuple(of((3, *a.shape), a.dtype) for a in (x16, w8, rows))),
    "scan": ("H200", scanned, (x16, of((LAYERS, N, K), E4M3), of((LAYERS, N, 1), F32))),
    "list": ("H200", listed, (x16, [w8] * LAYERS, [rows] * LAYERS)),
    "mxfp8": ("B200", mxfp8, (of((M, K), E4M3), w8, of((M, K // 32), e8m0), of((N, K // 32), e8m0))),
}


def compile_program(device: str, f: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Steps, scratch memory and HLO of a program."""
    return compiled(find_device(device), lambda place: jax.jit(f).trace(*place(arguments)))


if __name__ == "__main__":
    answer(lambda: {name: compile_program(*program) for name, program in PROGRAMS.items()})
