"""Products of `wgmma` whose sums begin at zero: `values [64, K] @ x[M, K].T`, values in registers, x in shared memory.

Pallas's own product adds to an accumulator, so that one that begins anew has zeros written into all of its registers
first, while the product before still holds as many. Here the first instruction is told not to read them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from pallas_kernels.mosaic.operand import ROWS, VALUES

_DEPTH = 16  # columns that an instruction multiplies


def _instructions(rows: int, dtype: str, offsets: list[int]) -> str:
    """PTX of a whole product, in the names of `inline_ptx`: sums, the operand's registers, the descriptor of x.

    Args:
      offsets: of x's columns of each instruction, as descriptors count, from the descriptor's.
    """
    count = ROWS * rows // 128
    sums = ", ".join(f"${i}" for i in range(count))
    lines = [".reg .b64 at;", ".reg .pred old;", "wgmma.fence.sync.aligned;"]
    for i, offset in enumerate(offsets):
        operand = ", ".join(f"${count + 4 * i + j}" for j in range(4))
        lines += [
            f"add.s64 at, ${count + 4 * len(offsets)}, {offset};",
            f"setp.ne.b32 old, {int(i > 0)}, 0;",
            f"wgmma.mma_async.sync.aligned.m64n{rows}k{_DEPTH}.f32.{dtype}.{dtype} "
            f"{{{sums}}}, {{{operand}}}, at, old, 1, 1, 0;",
        ]
    return "\n".join(["{", *lines, "wgmma.commit_group.sync.aligned;", "}"])


def _begin(values: Any, x: ir.Value, dtype: str, swizzle: int) -> Any:
    """`begin` on a lane's registers; x tiled `[M / 8, K / width, 8, width]`."""
    tiles, across, eight, width = ir.MemRefType(x.type).shape
    rows, i32, f32 = tiles * eight, ir.IntegerType.get_signless(32), ir.F32Type.get()
    (base, (_, steps)), (_, group), fastest = mma_utils.create_descriptor(
        mgpu.utils.memref_transpose(x, (1, 0, 3, 2)), swizzle=swizzle, large_tile=(width, width),
        group_size=(width, rows), logical_k_major=True,
    )  # fmt: skip
    assert fastest == mma_utils.Dim.K, fastest
    places = [divmod(first, width) for first in range(0, across * width, _DEPTH)]
    offsets = [mma_utils.encode_addr(tile * group + inside // _DEPTH * steps[0]) for tile, inside in places]
    operand = [
        mgpu.utils.bitcast(register, i32)
        for i in range(len(places))
        for register in values[:, i * _DEPTH : (i + 1) * _DEPTH].registers.flat
    ]
    count = ROWS * rows // 128
    sums = mgpu.utils.inline_ptx(
        _instructions(rows, dtype, offsets), *operand, base, result_types=[f32] * count, has_side_effects=True,
        convergent=True,
    )  # fmt: skip
    pair = ir.VectorType.get((2,), f32)
    registers = [vector.from_elements(pair, list(sums[i : i + 2])) for i in range(0, count, 2)]
    shape = mgpu.WGMMA_LAYOUT.registers_shape((ROWS, rows))
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
    )


def begin(values: jax.Array, x: Any, transforms: tuple[Any, Any]) -> jax.Array:
    """Starts a product and comes back.

    Args:
      values: `[64, K]` in `VALUES`, bfloat16 or float16.
      x: `[M, K]` of the same dtype in shared memory, M a multiple of 8, 256 at most.
      transforms: how it lies there: tiles of 8 rows, swizzled.

    Returns:
      its sums, float32 `[64, M]` in `VALUES`: registers that must not be touched before `finished`.
    """
    dtype = {"bfloat16": "bf16", "float16": "f16"}[values.dtype.name]
    swizzle = transforms[1].swizzle
    return plgpu.inline_mgpu(
        arg_types=(VALUES, plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct((ROWS, x.shape[0]), jnp.float32, layout=VALUES),
    )(lambda _, v, ref: _begin(v, ref, dtype, swizzle))(values, x)


def ready(values: jax.Array, layout: Any = VALUES) -> jax.Array:
    """The same values; what makes them is not put off to after what follows."""
    return plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout)
    )(lambda _, v: fragmented_array.optimization_barrier(v))(values)


def _finished(sums: Any, flying: int) -> Any:
    mgpu.utils.inline_ptx(f"wgmma.wait_group.sync.aligned {flying};", has_side_effects=True, convergent=True)
    return fragmented_array.optimization_barrier(sums)


def finished(sums: jax.Array, flying: int) -> jax.Array:
    """Sums of `begin`, once no more than `flying` products that were started later are under way."""
    return plgpu.inline_mgpu(
        arg_types=(VALUES,), return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=VALUES)
    )(lambda _, v: _finished(v, flying))(sums)
