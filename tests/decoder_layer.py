"""A decoder layer from its attention to the next one's, in float64, and what a kernel needs to do it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from pallas_kernels.mosaic.layer_steps import Stored
from qjax.dequantize import block_scales
from qjax.qtensor import QTensor

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a layer, its weights' scheme, rows of x."""

    scheme: str
    rows: int
    hidden: int
    inner: int
    attended: int
    heads: int  # features of q, k and v
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sizes = f"{self.rows}x{self.attended}x{self.hidden}x{self.inner}x{self.heads}"
        return f"layer_steps {self.scheme}-{sizes}-{self.dtype}"


@dataclasses.dataclass(frozen=True)
class Operands:
    """Random ones."""

    weights: list[QTensor]
    attended: jax.Array
    residual: jax.Array
    norms: list[jax.Array]
    bias: jax.Array

    @property
    def stored(self) -> list[Stored]:
        """The weights as the kernels take them."""
        return [
            Stored(
                weight=w.scheme.weight,
                group=w.scheme.block[1] or w.in_features,
                packed=w.packed,
                scale=block_scales(w) if isinstance(w.scale, QTensor) else w.scale,
                zero_point=w.zero_point,
                global_scale=w.global_scale,
                bias=bias,
            )
            for w, bias in zip(self.weights, (None, None, None, self.bias), strict=True)
        ]


def operands(layer: Layer, seed: int = 0) -> Operands:
    """Of a size that keeps everything near one; norms are of the two types that models keep them in."""
    key = iter(jax.random.split(jax.random.key(seed), 9))
    sizes = [
        (layer.attended, layer.hidden), (layer.hidden, 2 * layer.inner),
        (layer.inner, layer.hidden), (layer.hidden, layer.heads),
    ]  # fmt: skip
    weights = [
        qjax.quantize_array(jax.random.normal(next(key), size) * size[0] ** -0.5, layer.scheme, partial_groups=True)
        for size in sizes
    ]
    attended, residual = (jax.random.normal(next(key), (layer.rows, n)) for n in (layer.attended, layer.hidden))
    norms = [1 + 0.3 * jax.random.normal(next(key), (layer.hidden,)) for _ in range(2)]
    bias = jax.random.normal(next(key), (layer.heads,))
    return Operands(
        weights, attended.astype(layer.dtype), residual.astype(layer.dtype),
        [norms[0].astype(layer.dtype), norms[1]], bias.astype(layer.dtype),
    )  # fmt: skip


def exact(o: Operands) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream behind the layer, and the next one's queries, keys and values, float64."""

    def wide(a: Any) -> np.ndarray:
        return np.asarray(a, np.float64)

    def normalized(h: np.ndarray, norm: jax.Array) -> np.ndarray:
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + EPSILON) * wide(norm)

    by_o, by_gate_up, by_down, by_qkv = (wide(w.dequantize()) for w in o.weights)
    h = wide(o.residual) + wide(o.attended) @ by_o
    gate, up = np.split(normalized(h, o.norms[0]) @ by_gate_up, 2, -1)
    h = h + (gate / (1 + np.exp(-gate)) * up) @ by_down
    return h, normalized(h, o.norms[1]) @ by_qkv + wide(o.bias)


def off(found: jax.Array, expected: np.ndarray) -> float:
    """The error's norm, relative, in units of half an ulp."""
    error = np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    return float(error / (jnp.finfo(found.dtype).eps / 2))


# Each result is rounded once, behind up to four roundings of what it is made of. A uniform error of half an ulp at most
# has a norm of 0.4 half ulps, five of them one of 0.9; NF4's and FP4's values are rounded, too.
ALLOWED = {"nf4": 1.3, "fp4": 1.3}
