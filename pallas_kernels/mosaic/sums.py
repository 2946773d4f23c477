"""Where values and sums of `wgmma` are what their names say: made before this point, done by this point."""

from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.operand import VALUES


def ready(values: jax.Array, layout: Any = VALUES) -> jax.Array:
    """The same values; what makes them is not put off to after what follows."""
    return plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout)
    )(lambda _, v: fragmented_array.optimization_barrier(v))(values)


def _finished(sums: Any, flying: int) -> Any:
    mgpu.utils.inline_ptx(f"wgmma.wait_group.sync.aligned {flying};", has_side_effects=True, convergent=True)
    return fragmented_array.optimization_barrier(sums)


def finished(sums: jax.Array, flying: int) -> jax.Array:
    """Sums, once no more than `flying` products that were started later are under way."""
    return plgpu.inline_mgpu(
        arg_types=(VALUES,), return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=VALUES)
    )(lambda _, v: _finished(v, flying))(sums)
