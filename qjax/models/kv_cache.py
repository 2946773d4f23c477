"""Keys and values of past tokens: a pytree of fixed size, updated functionally, donatable.

Slot t of a row holds the token at position t, so rows of different lengths share one cache and
need no offsets. A slot past a row's length holds nothing yet and is never attended to: a query at
position p sees the slots up to p, and p's own slot is written before it is read.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys (rotated) and values, `[B, kv_heads, capacity, head_dim]`: what a head reads lies together."""

    keys: jax.Array
    values: jax.Array

    def store(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> "LayerCache":
        """With `keys`, `values` `[B, kv_heads, S, head_dim]` in the slots `positions` `[B, S]`.

        Negative positions are padding: not stored. Nor is what lies past the capacity.
        """
        batch, heads, capacity = self.keys.shape[:3]
        slots = jnp.where(positions < 0, capacity, positions)[:, None]
        at = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], slots
        return LayerCache(
            self.keys.at[at].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[at].set(values.astype(self.values.dtype), mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """All layers' caches, and how many tokens each row holds: int32 `[B]`."""

    layers: tuple[LayerCache, ...]
    lengths: jax.Array

    @classmethod
    def zeros(
        cls,
        *,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
    ) -> "KVCache":
        """An empty cache of `capacity` slots a row."""

        def slots() -> jax.Array:
            return jnp.zeros((batch, kv_heads, capacity, head_dim), dtype)

        return cls(
            tuple(LayerCache(slots(), slots()) for _ in range(layers)),
            jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.layers[0].keys.shape[2]
