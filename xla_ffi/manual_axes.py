"""Custom calls inside of a shard_map: JAX wants to be told over which of its axes operands and results vary."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def vary_alike[T](operands: T) -> T:
    """The arrays of a pytree, each marked as varying over every axis that one of them varies over."""
    leaves = jax.tree.leaves(operands)
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in leaves))

    def mark(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(varying - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(mark, operands)


def result_like(a: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies as the operand `a` does."""
    known = jax.typeof(a)
    if not known.manual_axis_type.varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    anywhere = NamedSharding(known.sharding.mesh, PartitionSpec())  # names the mesh, without which axes mean nothing
    return jax.ShapeDtypeStruct(shape, dtype, sharding=anywhere, manual_axis_type=known.manual_axis_type)
