"""What a kernel gives back, for `pl.pallas_call`."""

from typing import Any

import jax


def result(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """An array of that shape and dtype; inside a shard_map it varies over the mesh axes that the operands vary over."""
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))
