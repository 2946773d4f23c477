"""`total + part * scale` on the accumulators of `wgmma`, one scale a row: one FFMA an element."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from pallas_kernels.mosaic.operand import OF_ROWS, VALUES


def _in_lanes(total: Any, part: Any, scale: Any) -> Any:
    """Registers are pairs of columns, those of row r and r + 8 in turns."""
    f32 = ir.F32Type.get()
    of_half = [vector.extract(v, [], [0]) for v in scale.registers.flat]
    found = []
    for i, (sums, products) in enumerate(zip(total.registers.flat, part.registers.flat, strict=True)):
        for lane in range(2):
            fused = mgpu.utils.inline_ptx(
                "fma.rn.f32 $0, $1, $2, $3;",
                vector.extract(products, [], [lane]),
                of_half[i % 2],
                vector.extract(sums, [], [lane]),
                result_types=f32,
            )
            sums = vector.insert(fused, sums, [], [lane])
        found.append(sums)
    registers = np.array(found, dtype=object).reshape(total.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)


def add_scaled(total: jax.Array, part: jax.Array, scale: jax.Array | None, interpret: bool) -> jax.Array:
    """`total + part * scale`, rounded once: float32 `[64, M]` in `VALUES` and `[64]` in `OF_ROWS`, None for ones."""
    if scale is None:
        return total + part
    if interpret:
        return total + part * scale[:, None]
    return plgpu.inline_mgpu(
        arg_types=(VALUES, VALUES, OF_ROWS),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=VALUES),
    )(lambda _, *a: _in_lanes(*a))(total, part, scale)
