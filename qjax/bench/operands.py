"""Operands of a benchmark, made at their size on the device: random codes under random scales, random rows of x.

Any code is a lawful one, and a float weight of that size would take longer to quantize than the product to measure.
Weights have a root mean square near `1 / sqrt(K)` and x is normal, so that y is about 1, as in a network.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import devices
from qjax.bench.exact import columns_of
from qjax.bench.programs import Effort, rotation
from qjax.dispatch.problem import Problem
from qjax.formats import FORMATS, Format
from qjax.kernel_call import problem_of
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array
from qjax.schemes import Scheme


@functools.lru_cache(maxsize=256)
def weight_like(scheme: Scheme, n: int, k: int) -> QTensor:
    """A weight of ShapeDtypeStructs, as `quantize_array` would make it of a `[K, N]` kernel.

    Raises:
      QuantizeError: if the scheme's groups do not divide K.
    """
    kernel = jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    like = jax.eval_shape(lambda w: quantize_array(w, scheme, where=f"{n}x{k}"), kernel)
    if scheme.is_static:
        return dataclasses.replace(like, act_scale=jax.ShapeDtypeStruct((), jnp.float32))
    return like


def product_of(scheme: Scheme, m: int, n: int, k: int, dtype: Any) -> Problem:
    """The product of `m` rows of x in `dtype` by such a weight, as dispatch is asked about it."""
    like = dataclasses.replace(weight_like(scheme, n, k), act_scale=None)
    inside = FORMATS[scheme.activation.format].dtype if scheme.activation else dtype
    return problem_of(like, m=m, x_dtype=inside, out_dtype=dtype)


@functools.partial(jax.jit, static_argnames=("scheme", "n", "k"))
def random_weight(key: jax.Array, scheme: Scheme, n: int, k: int) -> QTensor:
    """A weight of logical shape `[K, N]`."""
    like = weight_like(scheme, n, k)
    code_key, scale_key, zero_key = jax.random.split(key, 3)
    step = 1 / (math.sqrt(k) * _code_rms(scheme.format))
    fields: dict[str, Any] = dict(packed=_codes(code_key, like.packed, scheme.format))
    if like.global_scale is None:
        fields["scale"] = _scales(scale_key, like.scale, step)
    else:
        fields["scale"] = _scales(scale_key, like.scale, 128.0)  # in the middle of e4m3
        fields["global_scale"] = jnp.full(like.global_scale.shape, step / 128, jnp.float32)
    if like.zero_point is not None:
        middle, away = scheme.format.zero, max(1, 2 ** (scheme.bits - 3))
        zero = jax.random.randint(zero_key, like.zero_point.shape, middle - away, middle + away + 1)
        fields["zero_point"] = zero.astype(like.zero_point.dtype)
    if like.act_scale is not None:
        assert scheme.activation is not None
        fields["act_scale"] = jnp.float32(4 / FORMATS[scheme.activation.format].maximum)  # x is within 4, nearly always
    return dataclasses.replace(like, **fields)


def _code_rms(form: Format) -> float:
    """Root mean square of what `_codes` stands for."""
    if form.kind == "codebook":
        assert form.codebook is not None, form.name
        return math.sqrt(np.square(form.codebook).mean())
    return form.maximum / (4 if form.kind == "float" else math.sqrt(3))


def _codes(key: jax.Array, like: Any, form: Format) -> jax.Array:
    """Integers and codebook indices uniform over all of them, floats normal."""
    if form.kind == "float":
        values = jax.random.normal(key, like.shape) * (form.maximum / 4)
        return jnp.clip(values, -form.maximum, form.maximum).astype(like.dtype)
    bits = jax.random.bits(key, like.shape, jnp.uint32 if like.dtype == jnp.uint32 else jnp.uint8)
    return jax.lax.bitcast_convert_type(bits, like.dtype)


def _scales(key: jax.Array, like: Any, mean: float) -> Any:
    """Positive scales about `mean`; powers of two for e8m0; nested ones around their offset."""
    if isinstance(like, QTensor):
        code_key, scale_key = jax.random.split(key)
        codes = _codes(code_key, like.packed, like.scheme.format)
        outer = _scales(scale_key, like.scale, mean / 3)  # half of the mean at most: the sum stays positive
        return dataclasses.replace(like, packed=codes, scale=outer, offset=jnp.full((), mean, jnp.float32))
    if like.dtype == jnp.float8_e8m0fnu:
        exponent = 127 + round(math.log2(mean)) + jax.random.randint(key, like.shape, -1, 2)
        return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint8), like.dtype)
    return (mean * jax.random.uniform(key, like.shape, minval=0.5, maxval=1.5)).astype(like.dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal with that standard deviation: rows of x, or a dense weight."""
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


class Operands:
    """The weights for one (N, K) and the rows of x that meet them: made when first asked for, kept with this object.

    Attributes:
      device: that products run on.
      dtype: of x and of dense weights: bfloat16 where tensor cores take it.
    """

    def __init__(self, n: int, k: int, effort: Effort) -> None:
        self.n, self.k, self.effort = n, k, effort
        self.device = devices.current()
        self.dtype = devices.compute_dtype(self.device)
        self._made: dict[Any, Any] = {}

    def weights(self, scheme: Scheme) -> list[QTensor]:
        """As many as a program rotates through."""
        if scheme not in self._made:
            count = rotation(weight_like(scheme, self.n, self.k).nbytes, self.device, self.effort)
            keys = jax.random.split(jax.random.key(0), count)
            self._made[scheme] = [random_weight(key, scheme, self.n, self.k) for key in keys]
        return self._made[scheme]

    def dense(self, shape: tuple[int, int]) -> list[jax.Array]:
        """As many dense weights of shape `(N, K)` or `(K, N)` as a program rotates through."""
        if shape not in self._made:
            count = rotation(self.n * self.k * self.dtype.itemsize, self.device, self.effort)
            keys = jax.random.split(jax.random.key(1), count)
            self._made[shape] = [random_array(key, shape, self.dtype, self.k**-0.5) for key in keys]
        return self._made[shape]

    def rows(self, m: int, count: int) -> list[jax.Array]:
        """The first `count` x of `[m, K]`."""
        made = self._made.setdefault(m, [])
        for i in range(len(made), count):
            made.append(random_array(jax.random.key(2 + i), (m, self.k), self.dtype))
        return made[:count]

    def columns(self, scheme: Scheme) -> np.ndarray:
        """`columns_of` the scheme's first weight."""
        if (scheme, "columns") not in self._made:
            self._made[scheme, "columns"] = columns_of(self.weights(scheme)[0])
        return self._made[scheme, "columns"]
