"""CASES: the products that every backend is tried on; the oracle they are held to; how far they may be from it.

A backend's test runs `assert_product` on its own result for each case that it claims. Shapes are named by hazard: one
row, one output, no rows, an odd N, one group, and the K of real models that are no multiple of 128 or of 8 groups.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activations import quantize_rows
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array
from qjax.schemes import parse_scheme

WEIGHT_ONLY = (
    "w8a16",
    "w8a16:group_size=128",
    "w8a16:group_size=tensor",
    "w8a16:group_size=64,symmetric=false",
    "w6a16:group_size=64",
    "w5a16:symmetric=false",
    "w4a16",
    "w4a16:group_size=32",
    "w4a16:group_size=16,symmetric=false",
    "w4a16:group_size=-1",
    "w4a16:group_size=-1,symmetric=false",
    "w4a16:group_size=64,scale_dtype=bfloat16",
    "w3a16",
    "w3a16:group_size=32,symmetric=true",
    "w2a16",
    "fp8",
    "fp8:granularity=tensor",
    "fp8:granularity=block",
    "fp8:format=e5m2",
    "nf4",
    "nf4:double_quant=true",
    "fp4",
    "mxfp4",
    "mxfp8",
    "mxfp8:format=e5m2",
    "nvfp4",
)
QUANTIZED_X = (
    "w8a8_int8",
    "w8a8_int8:activation=tensor",
    "w8a8_int8:mode=static",
    "w4a8_int8",
    "w4a8_int8:group_size=32,symmetric=false",
    "w8a8_fp8",
    "w8a8_fp8:granularity=tensor,mode=static",
    "w8a8_fp8:granularity=block,activation=block",
)
SCHEMES = WEIGHT_ONLY + QUANTIZED_X

# name -> (M, K, N)
SHAPES = {
    "one row": (1, 256, 64),
    "odd N": (7, 256, 37),
    "one group": (3, 128, 24),
    "one output": (4, 256, 1),
    "no rows": (0, 256, 16),
    "leading": (16, 512, 96),
}

# K of Llama-7B-like, DeepSeek-V2-lite, SigLIP and GPT-OSS layers over 8 devices or whole, with groups that divide it.
UNEVEN = (
    (7392, "w4a16:group_size=32"),
    (7392, "mxfp4"),
    (7392, "w3a16:group_size=32"),
    (10944, "w4a16:group_size=64,symmetric=false"),
    (10944, "nf4"),
    (4304, "w4a16:group_size=16"),
    (4304, "nvfp4"),
    (4304, "w4a16:group_size=-1"),
    (2880, "w4a16:group_size=64"),
    (2880, "fp8:granularity=block"),
    (2880, "mxfp8"),
)


def _seed(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: `[m, k]` by a weight `[k, n]` of `scheme`."""

    scheme: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.scheme} {self.m}x{self.k}x{self.n}"

    def kernel(self) -> np.ndarray:
        """float32 `[K, N]` with the spread of a trained layer: columns and rows of different size."""
        rng = _seed(f"w{self}")
        w = rng.standard_normal((self.k, self.n)) * rng.uniform(0.2, 2.0, (1, self.n)) / math.sqrt(self.k)
        return (w * rng.uniform(0.5, 1.5, (self.k, 1))).astype(np.float32)

    def x(self, dtype: Any = "float32") -> jax.Array:
        """`[M, K]`, unit variance, with a few large columns as activations have."""
        rng = _seed(f"x{self}")
        x = rng.standard_normal((self.m, self.k)) * np.where(rng.uniform(size=self.k) < 0.02, 8.0, 1.0)
        return jnp.asarray(x, jnp.dtype(dtype))

    def qtensor(self) -> QTensor:
        """The quantized kernel, with a static scale of x where the scheme wants one."""
        return _qtensor(self)


@functools.lru_cache(maxsize=32)
def _qtensor(case: Case) -> QTensor:
    w = quantize_array(jnp.asarray(case.kernel()), case.scheme)
    activation = parse_scheme(case.scheme).activation
    if activation is None or activation.mode == "dynamic":
        return w
    # Two thirds of what would hold all of x, so that some of it saturates.
    amax = float(np.abs(np.asarray(case.x())).max(initial=1.0))
    return dataclasses.replace(w, act_scale=jnp.float32(amax / FORMATS[activation.format].maximum / 1.5))


CASES = (
    *(Case(s, *SHAPES["odd N"]) for s in SCHEMES),
    *(
        Case(s, *SHAPES[name])
        for name in SHAPES
        if name != "odd N"
        for s in (
            "w4a16",
            "w4a16:group_size=16,symmetric=false",
            "w8a16",
            "fp8",
            "nf4:double_quant=true",
            "nvfp4",
            "w8a8_int8",
        )
    ),
    *(Case(s, m, k, 9) for m, (k, s) in zip((1, 2, 5) * 4, UNEVEN, strict=False)),
)


def _erf(t: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(t)


EPILOGUES = {
    None: lambda t: t,
    "relu": lambda t: np.maximum(t, 0),
    "silu": lambda t: t / (1 + np.exp(-t)),
    "gelu": lambda t: t * (1 + _erf(t / math.sqrt(2))) / 2,
    "gelu_tanh": lambda t: t * (1 + np.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))) / 2,
}


@functools.partial(jax.jit, static_argnums=1)
def _rows(x: jax.Array, activation: Any, act_scale: Any) -> jax.Array:
    return quantize_rows(x, activation, act_scale).dequantize()


def x_met(x: jax.Array, w: QTensor) -> np.ndarray:
    """What the weight meets in float64: x, or x as the scheme quantizes it. `[..., K]`, no stack."""
    return np.asarray(_rows(x, w.scheme.activation, w.act_scale), np.float64)


def float64(w: QTensor) -> np.ndarray:
    """The dequantized weight, `[*stack, K, N]`: float32 arithmetic by `qjax.dequantize`, then float64."""
    return np.asarray(w.dequantize(jnp.float32), np.float64)


def oracle(
    x: np.ndarray, w: np.ndarray, bias: Any = None, activation: str | None = None, residual: Any = None
) -> np.ndarray:
    """`residual + activation(x @ w + bias)` in float64, of what `x_met` and `float64` give."""
    y = x @ w
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    y = EPILOGUES[activation](y)
    return y if residual is None else y + np.asarray(residual, np.float64)


# Half a unit in the last place, relative (the unit roundoff), and half the smallest spacing.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
FLOOR = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}


def tolerance(
    x: np.ndarray, w: np.ndarray, exact: np.ndarray, dtype: Any, *, epilogue: np.ndarray | float = 0.0
) -> np.ndarray:
    """How far each element of a product accumulated in float32 and rounded once may be from `exact`.

    A sum of K products in float32 errs by at most K u sum|x||w|, u = 2^-24, in the worst case and in any order;
    roundings are as good as independent, and by Higham and Mary (2019, theorem 2.4) the error stays below
    lambda sqrt(K) u sum|x||w| but for a probability 2 exp(-lambda^2 / 2) an element: lambda = 5 is one in 10^5, of the
    worst signs. Two more u are for the rounding of a product, and of a weight that a kernel dequantizes in another
    order than the oracle. The epilogue's functions have slopes up to 1.13 and err by less than 16 u of their argument
    (`epilogue`, its magnitude). Then one rounding to the output.
    """
    u, name = ROUNDOFF["float32"], np.dtype(dtype).name
    sums = (5 * math.sqrt(x.shape[-1]) + 2) * u * (np.abs(x) @ np.abs(w))
    return 1.13 * sums + 16 * u * epilogue + ROUNDOFF[name] * np.abs(exact) + FLOOR[name]


def assert_product(
    y: jax.Array,
    x: jax.Array,
    w: QTensor,
    bias: Any = None,
    activation: str | None = None,
    residual: Any = None,
) -> None:
    """Holds `y`, a backend's `residual + activation(x @ w + bias)`, to the oracle.

    Each element is within `tolerance`. Over all of a 16-bit result the error is at most 1.25 times that of rounding the
    exact result: there float32 sums are far below the rounding (2^-24 sqrt(K) against 2^-8 or 2^-11), which leaves 25 %
    for kernels that round products of codes and x.
    """
    met, dense = x_met(x, w), float64(w)
    exact = oracle(met, dense, bias, activation, residual)
    got = np.asarray(y, np.float64)
    assert got.shape == exact.shape, (got.shape, exact.shape)
    has_epilogue = bias is not None or activation is not None or residual is not None
    argument = (
        np.abs(met @ dense) + np.abs(0 if bias is None else np.asarray(bias, np.float64)) if has_epilogue else 0.0
    )
    bound = tolerance(met, dense, exact, y.dtype, epilogue=argument)
    worst = np.max(np.abs(got - exact) / bound, initial=0.0)
    assert worst <= 1, f"error is {worst:.3g} of what is allowed, in {np.sum(np.abs(got - exact) > bound)} elements"
    if y.dtype.itemsize == 2 and exact.size >= 64:
        ratio = np.linalg.norm(got - exact) / np.linalg.norm(np.asarray(exact.astype(y.dtype), np.float64) - exact)
        assert ratio <= 1.25, f"error is {ratio:.3f} of that of rounding the exact result to {y.dtype}"
