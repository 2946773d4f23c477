"""Integer grids: the scale and zero point of each group of a row, and rounding to them.

Codes are unsigned here, 0 to `2^bits - 1`, and held in float32; `w' = (code - zero) * scale`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.quantize import to_range
from qjax.quotient import quotient

SHORTEST = 0.4  # the shortest range of a clip search, as a share of the whole


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a group gets its scale and zero point.

    Attributes:
      bits: of a code.
      symmetric: the zero point is `2^(bits - 1)`.
      dtype: scales are rounded to it.
      shrinks: how many shorter ranges are tried beside the whole one, down to 0.4 of it; the one with the least
        weighted squared error wins. 0 tries none.
      real_zero: zero points are no integers (HQQ).
    """

    bits: int
    symmetric: bool
    dtype: np.dtype
    shrinks: int = 0
    real_zero: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit(self, w: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point of groups.

        Args:
          w: float32 `[..., g]`.
          weight: broadcastable against w: what the square of an error at each weight counts.

        Returns:
          Two float32 arrays `[..., 1]`; the scale is as it reads after rounding to `dtype`.
        """
        shares = jnp.linspace(1.0, SHORTEST, self.shrinks + 1)

        def better(best: Any, share: jax.Array) -> tuple[Any, None]:
            scale, zero = self._of_range(w, share)
            error = jnp.sum(
                weight * (self.value(self.nearest(w, scale, zero), scale, zero) - w) ** 2, -1, keepdims=True
            )
            wins = error < best[0]
            new = (jnp.where(wins, a, b) for a, b in zip((error, scale, zero), best, strict=True))
            return tuple(new), None

        least = jnp.full((*w.shape[:-1], 1), jnp.inf)
        (_, scale, zero), _ = jax.lax.scan(better, (least, least, least), shares)
        return scale, zero

    def _of_range(self, w: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The formulas of `qjax.schemes.W4A16` for a share of the range."""
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = quotient(share * jnp.max(jnp.abs(w), -1, keepdims=True), half - 1.0)
            scale = to_range(scale, self.dtype).astype(jnp.float32)
            return scale, jnp.full_like(scale, half)
        low = share * jnp.min(jnp.minimum(w, 0), -1, keepdims=True)
        high = share * jnp.max(jnp.maximum(w, 0), -1, keepdims=True)
        scale = to_range(quotient(high - low, float(self.top)), self.dtype).astype(jnp.float32)
        return scale, jnp.clip(jnp.round(quotient(-low, scale)), 0, self.top)

    def nearest(self, w: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        """The code nearest to each weight."""
        return jnp.clip(jnp.round(quotient(w, scale)) + zero, 0, self.top)

    def value(self, code: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        """What a code stands for."""
        return (code - zero) * scale
