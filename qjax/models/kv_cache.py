"""Keys and values of past tokens: a pytree of fixed size, updated functionally, donatable.

Slot t of a row holds the token at position t, so rows of different lengths share one cache and
need no offsets. A slot past a row's length holds nothing yet and is never attended to: a query at
position p sees the slots up to p, and p's own slot is written before it is read.

A cache of 8 bits holds codes, and a scale for each token and head: half the bytes of 16 bits, and read as
`code * scale` with `scale = amax / top` over the head's numbers, top 127 for int8 and 448 for e4m3 ("fp8").
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qjax.activations import quantize_rows
from qjax.schemes import Activation

CODED = {"int8": np.dtype(jnp.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}  # caches of codes, by what users call them
_CODING = {CODED["int8"]: Activation("int8", "token"), CODED["fp8"]: Activation("e4m3", "token")}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys (rotated) and values, `[B, kv_heads, capacity, head_dim]`: what a head reads lies together.

    Scales are float32 `[B, kv_heads, capacity]` where keys and values are codes, else None.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    def store(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> "LayerCache":
        """With `keys`, `values` `[B, kv_heads, S, head_dim]` in the slots `positions` `[B, S]`.

        Negative positions are padding: not stored. Nor is what lies past the capacity.
        """
        batch, heads, capacity = self.keys.shape[:3]
        slots = jnp.where(positions < 0, capacity, positions)[:, None]
        at = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], slots

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[at].set(new.astype(old.dtype), mode="drop")

        if self.key_scale is None or self.value_scale is None:
            return LayerCache(put(self.keys, keys), put(self.values, values))
        (keys, key_scale), (values, value_scale) = (_codes(a, self.keys.dtype) for a in (keys, values))
        return LayerCache(
            put(self.keys, keys), put(self.values, values),
            put(self.key_scale, key_scale), put(self.value_scale, value_scale),
        )  # fmt: skip

    def read(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values, those of codes rounded to `dtype`."""
        if self.key_scale is None or self.value_scale is None:
            return self.keys, self.values
        pairs = (self.keys, self.key_scale), (self.values, self.value_scale)
        keys, values = ((codes.astype(jnp.float32) * scale[..., None]).astype(dtype) for codes, scale in pairs)
        return keys, values


def _codes(x: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """`[..., head_dim]` -> codes, and float32 scales `[...]`."""
    rows = quantize_rows(x, _CODING[dtype], None)
    assert rows.scale is not None
    return rows.values, rows.scale[..., 0]


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
        """An empty cache of `capacity` slots a row; of codes where `dtype` is one of `CODED`."""
        coded = jnp.dtype(dtype) in _CODING

        def layer() -> LayerCache:
            keys, values = (jnp.zeros((batch, kv_heads, capacity, head_dim), dtype) for _ in range(2))
            if not coded:
                return LayerCache(keys, values)
            return LayerCache(keys, values, *(jnp.ones((batch, kv_heads, capacity), jnp.float32) for _ in range(2)))

        return cls(
            tuple(layer() for _ in range(layers)),
            jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.layers[0].keys.shape[2]
