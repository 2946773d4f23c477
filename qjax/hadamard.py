"""Rotation of K by Hadamard matrices: what makes weights look Gaussian, whatever they were."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix, +-1: symmetric, and its own inverse but for a factor of `size`."""
    one = np.array([[1.0, 1.0], [1.0, -1.0]], np.float32)
    return functools.reduce(np.kron, [one] * (size.bit_length() - 1), np.ones((1, 1), np.float32))


def rotate(a: jax.Array, size: int) -> jax.Array:
    """`a @ blockdiag(H / sqrt(size))` along the last axis: orthogonal, symmetric, and its own inverse.

    So products are what they were: `rotate(x) @ rotate(w) = x @ w`. The sum is float32, rounded once to a's dtype.

    Args:
      a: float `[..., K]`, size dividing K.
      size: a power of two.
    """
    blocks = a.reshape(*a.shape[:-1], a.shape[-1] // size, size)
    turned = jnp.matmul(
        blocks,
        jnp.asarray(_matrix(size), a.dtype),  # exact in any float
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (turned / math.sqrt(size)).astype(a.dtype).reshape(a.shape)
