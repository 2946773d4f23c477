"""QTensor -> array, by the law in `qjax.qtensor`: the oracle of every kernel, and the last resort."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from qjax.formats import Format
from qjax.hadamard import rotate
from qjax.layouts import unpack
from qjax.qtensor import QTensor


def e8m0_to_float(scale: jax.Array) -> jax.Array:
    """e8m0 -> float32, exact down to 2^-127, which is subnormal."""
    biased = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.uint32)
    bits = jnp.where(biased == 0, jnp.uint32(1 << 22), biased << 23)
    return jax.lax.bitcast_convert_type(jnp.where(biased == 255, jnp.uint32(0x7FC00000), bits), jnp.float32)


def expand_blocks(scale: jax.Array, n: int, k: int, block: tuple[int | None, int | None]) -> jax.Array:
    """A value a block -> a value a weight: `[..., R, C]` -> `[..., N, K]`; axes of size 1 stay, and broadcast."""
    for axis, size, length in ((-2, block[0], n), (-1, block[1], k)):
        if scale.shape[axis] != 1 and size not in (None, 1):
            scale = repeat(scale, size, scale.ndim + axis)
            if scale.shape[axis] != length:  # the last block is a short one
                scale = jax.lax.slice_in_dim(scale, 0, length, axis=scale.ndim + axis)
    return scale


def repeat(a: jax.Array, count: int, axis: int) -> jax.Array:
    """`jnp.repeat(a, count, axis)` by a broadcast: no gather, and right for an axis that is cut over a mesh."""
    lead, tail = a.shape[: axis + 1], a.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(a, axis + 1), (*lead, count, *tail))
    return wide.reshape(*lead[:-1], lead[-1] * count, *tail)


def codes(w: QTensor) -> jax.Array:
    """The codes without padding, `[..., N, K]`: uint8 below 8 bits, else the format's dtype."""
    if not w.is_packed:
        return w.packed
    flat = unpack(w.packed, w.scheme.bits)
    logical, piece = w.k_piece
    pieces = flat.reshape(*flat.shape[:-1], flat.shape[-1] // piece, piece)[..., :logical]
    return pieces.reshape(*flat.shape[:-1], w.in_features)


def _table(values: tuple[float, ...]) -> jax.Array:
    """A codebook built of scalars, which XLA folds: custom_partitioning refuses functions with array constants."""
    return jnp.concatenate([jax.lax.full((1,), v, jnp.float32) for v in values])


def point_index(raw: jax.Array, form: Format) -> jax.Array:
    """Codes `[..., K]` -> int32 `[..., K / dims]`: which point of the format's codebook `dims` neighbours name."""
    parts = raw.reshape(*raw.shape[:-1], raw.shape[-1] // form.dims, form.dims).astype(jnp.int32)
    return functools.reduce(jnp.bitwise_or, [parts[..., j] << (form.bits * j) for j in range(form.dims)])


def code_values(w: QTensor) -> jax.Array:
    """What the codes stand for before scaling, zero point taken off: float32 `[..., N, K]`."""
    form, raw = w.scheme.format, codes(w)
    if form.kind == "codebook":
        if w.codebook is None:
            assert form.codebook is not None, form.name
            if form.dims == 1:
                return _table(form.codebook)[raw]
            return _table(form.codebook).reshape(-1, form.dims)[point_index(raw, form)].reshape(raw.shape)
        table = w.codebook.astype(jnp.float32)
        return jnp.take_along_axis(table[..., None, :], raw.astype(jnp.int32), axis=-1)
    values = raw.astype(jnp.float32)
    if w.zero_point is not None:
        zero = w.zero_point.astype(jnp.float32)
        return values - expand_blocks(zero, w.out_features, w.in_features, w.scheme.block)
    return values - form.zero if form.zero else values


def block_scales(w: QTensor) -> jax.Array:
    """Scales as one float32 array `[..., R, C]`, a nested one dequantized."""
    if isinstance(w.scale, QTensor):
        return rows_of_k(w.scale)
    if w.scale.dtype == jnp.float8_e8m0fnu:
        return e8m0_to_float(w.scale)
    return w.scale.astype(jnp.float32)


def rows_of_k(w: QTensor) -> jax.Array:
    """The weight in storage order, float32 `[..., N, K]`."""
    values = code_values(w) * expand_blocks(block_scales(w), w.out_features, w.in_features, w.scheme.block)
    if w.global_scale is not None:
        stack = len(w.stack_shape)
        rows = w.global_scale[..., None] if w.global_scale.ndim == stack else w.global_scale
        values = values * rows[..., None].astype(jnp.float32)
    if w.offset is not None:
        values = values + w.offset[..., None, None].astype(jnp.float32)
    return values


def dequantize(w: QTensor, dtype: Any = None) -> jax.Array:
    """The weight that `qjax.matmul` multiplies by, as an array of `w.shape`.

    Args:
      w: any QTensor; a rotation, `input_perm` and `input_scale`, which products apply to x, are undone here.
      dtype: of the result; default `w.dtype`. The arithmetic is float32.

    Returns:
      The kernel, cut over a mesh as its codes are; on Explicit axes replicated where an axis of several that make up K
      or N does not divide.
    """
    mesh = jax.typeof(w.packed).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return _dequantize(w, dtype)
    # Look-ups in a codebook have no sharding rule of their own: XLA finds it, with axes that are Auto inside.
    with jax.sharding.use_abstract_mesh(mesh):
        inside = functools.partial(_dequantize, dtype=dtype)
        return jax.sharding.auto_axes(inside, out_sharding=_kernel_spec(w))(w)


def _kernel_spec(w: QTensor) -> PartitionSpec:
    """The spec of the Flax kernel from that of the codes, which its type names."""
    packed = jax.typeof(w.packed).sharding
    *stack, n, k = packed.spec[:-1] if w.is_packed else packed.spec
    inputs, outputs = w.in_shape or (w.in_features,), w.out_shape or (w.out_features,)
    tail: list[Any] = [None] * (len(inputs) + len(outputs))
    for at, length, entry in ((0, inputs[0], k), (len(inputs), outputs[0], n)):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if length % math.prod(packed.mesh.shape[name] for name in names) == 0:
            tail[at] = entry
    return PartitionSpec(*stack, *(tail[a] for a in w.axes or range(len(tail))))


def _dequantize(w: QTensor, dtype: Any) -> jax.Array:
    kernel = rows_of_k(w)
    if w.scheme.hadamard:
        kernel = rotate(kernel, w.scheme.hadamard)
    if w.input_perm is not None:
        kernel = jnp.take_along_axis(kernel, jnp.argsort(w.input_perm, axis=-1)[..., None, :], axis=-1)
    if w.input_scale is not None:
        kernel = kernel * w.input_scale[..., None, :].astype(jnp.float32)
    kernel = kernel.astype(dtype or w.dtype).swapaxes(-1, -2)
    tail = (*(w.in_shape or (w.in_features,)), *(w.out_shape or (w.out_features,)))
    kernel = kernel.reshape(*w.stack_shape, *tail)
    if w.axes is None:
        return kernel
    stack = len(w.stack_shape)
    return kernel.transpose(*range(stack), *(stack + a for a in w.axes))
