"""What a model begins with: weights that are drawn, or, where there are no `rngs`, their shapes alone.

A model that is about to be filled from a file is made of shapes; tracing what would draw them takes many times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qjax.nnx.layer import NO_RNGS


def _shape_alone(key: Any, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An initializer."""
    return jax.ShapeDtypeStruct(shape, dtype)


def linear(n_in: int, n_out: int, *, rngs: nnx.Rngs | None, **options: Any) -> nnx.Linear:
    """`nnx.Linear`."""
    if rngs is not None:
        return nnx.Linear(n_in, n_out, **options, rngs=rngs)
    return nnx.Linear(n_in, n_out, **options, kernel_init=_shape_alone, bias_init=_shape_alone, rngs=NO_RNGS)


def embed(count: int, features: int, *, rngs: nnx.Rngs | None, **options: Any) -> nnx.Embed:
    """`nnx.Embed`."""
    if rngs is not None:
        return nnx.Embed(count, features, **options, rngs=rngs)
    return nnx.Embed(count, features, **options, embedding_init=_shape_alone, rngs=NO_RNGS)


def constant(features: int, value: float, dtype: DTypeLike, *, shape_alone: bool) -> nnx.Param[Any]:
    """A vector of one value, or its shape."""
    shape = (features,)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype) if shape_alone else jnp.full(shape, value, dtype))
