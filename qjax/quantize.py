"""Array -> QTensor, to nearest: one jitted function in float32, on the array's device; formulas in `qjax.schemes`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.dequantize import expand_blocks
from qjax.errors import QuantizeError
from qjax.formats import FORMATS, Format, codebook_thresholds
from qjax.hadamard import rotate
from qjax.layouts import pack
from qjax.qtensor import QTensor, k_pieces, scale_shape
from qjax.quotient import quotient
from qjax.schemes import Scheme, as_scheme

_E4M3 = FORMATS["e4m3"]


def reduce_blocks(w: jax.Array, block: tuple[int | None, int | None], reduce: Any) -> jax.Array:
    """`reduce` (jnp.max, jnp.min) of `[..., N, K]` over blocks -> `[..., R, C]`; a short last block is zero-padded."""
    n, k = w.shape[-2:]
    block_n, block_k = block[0] or n, block[1] or k
    widths = [(0, 0)] * (w.ndim - 2) + [(0, -n % block_n), (0, -k % block_k)]
    w = jnp.pad(w, widths)
    w = w.reshape(*w.shape[:-2], w.shape[-2] // block_n, block_n, w.shape[-1] // block_k, block_k)
    return reduce(w, axis=(-3, -1))


def encode(values: jax.Array, form: Format) -> jax.Array:
    """The nearest codes of a float or codebook format; beyond `form.maximum` it saturates.

    Args:
      values: float32, any shape; `[..., K]` of whole points.
      form: a row of `FORMATS` that is no integer.

    Returns:
      Codes in the format's dtype, shaped like `values`.
    """
    if form.kind == "float":
        return jnp.clip(values, -form.maximum, form.maximum).astype(form.dtype)
    if form.dims > 1:
        return _nearest_points(values, form)
    thresholds, order = codebook_thresholds(form.name)
    index = jnp.searchsorted(jnp.asarray(thresholds), values, side="right", method="compare_all")
    return jnp.asarray(order)[index]


def _nearest_points(values: jax.Array, form: Format) -> jax.Array:
    """`encode` of a format whose codebook has points: of equally near ones the first."""
    assert form.codebook is not None, form.name
    grid = jnp.asarray(form.codebook, jnp.float32).reshape(-1, form.dims)
    at = values.reshape(*values.shape[:-1], values.shape[-1] // form.dims, form.dims)
    index = jnp.argmin(sum((at[..., j, None] - grid[:, j]) ** 2 for j in range(form.dims)), axis=-1)
    codes = [index >> (form.bits * j) & (2**form.bits - 1) for j in range(form.dims)]
    return jnp.stack(codes, axis=-1).astype(form.dtype).reshape(values.shape)


def to_range(scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Scales rounded to `dtype`, kept positive, normal and finite; 1 where they were 0."""
    scale = jnp.where(scale == 0, 1.0, scale)
    info = jnp.finfo(dtype)
    return jnp.clip(scale, float(info.smallest_normal), float(info.max)).astype(dtype)


def _integer(w: jax.Array, scheme: Scheme, dtype: np.dtype, given: jax.Array | None) -> dict[str, jax.Array]:
    """Symmetric or asymmetric integers: unsigned codes below 8 bits, int8 at 8; symmetric ones by given scales."""
    form, (n, k) = scheme.format, w.shape[-2:]
    spread = functools.partial(expand_blocks, n=n, k=k, block=scheme.block)
    top = 2**form.bits - 1
    shift = 0 if form.bits < 8 else -128
    if scheme.symmetric:
        if given is None:
            given = quotient(reduce_blocks(jnp.abs(w), scheme.block, jnp.max), form.maximum)
        scale = to_range(given, dtype)
        half = 2 ** (form.bits - 1)
        q = jnp.clip(jnp.round(quotient(w, spread(scale.astype(jnp.float32)))), -half, half - 1)
        return dict(codes=(q + half + shift).astype(form.dtype), scale=scale)
    low = reduce_blocks(jnp.minimum(w, 0), scheme.block, jnp.min)
    high = reduce_blocks(jnp.maximum(w, 0), scheme.block, jnp.max)
    scale = to_range(quotient(high / 2 - low / 2, top / 2), dtype)  # halves, which don't overflow
    wide = scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(quotient(-low, wide)), 0, top)
    q = jnp.clip(jnp.round(quotient(w, spread(wide))) + spread(zero), 0, top)
    return dict(
        codes=(q + shift).astype(form.dtype),
        scale=scale,
        zero_point=(zero + shift).astype(jnp.int8),
    )


def _power_of_two(amax: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """The e8m0 scale `2^(floor(log2(amax)) - emax)`, 2^-127 for zeros, and its inverse in float32: both exact."""
    assert form.emax is not None, form.name
    _, exponent = jnp.frexp(amax)  # amax = m * 2^exponent, m in [0.5, 1)
    biased = jnp.where(amax == 0, 0, jnp.clip(exponent - 1 - form.emax + 127, 0, 253)).astype(jnp.uint32)
    inverse = jax.lax.bitcast_convert_type((254 - biased) << 23, jnp.float32)
    return jax.lax.bitcast_convert_type(biased.astype(jnp.uint8), jnp.float8_e8m0fnu), inverse


def _root_mean_square(w: jax.Array, scheme: Scheme) -> jax.Array:
    """Of each block, `[..., R, C]`; a short last block has fewer elements."""
    count = reduce_blocks(jnp.ones_like(w), scheme.block, jnp.sum)
    return jnp.sqrt(reduce_blocks(w * w, scheme.block, jnp.sum) / count)


def _scaled(w: jax.Array, scheme: Scheme, dtype: np.dtype) -> dict[str, jax.Array]:
    """Float and codebook formats, whose scale is the block's maximum over the format's."""
    form, (n, k) = scheme.format, w.shape[-2:]
    amax = reduce_blocks(jnp.abs(w), scheme.block, jnp.max)
    spread = functools.partial(expand_blocks, n=n, k=k, block=scheme.block)
    if dtype == jnp.float8_e8m0fnu:
        scale, inverse = _power_of_two(amax, form)
        return dict(codes=encode(w * spread(inverse), form), scale=scale)
    if not scheme.global_scale:
        size = quotient(amax, form.maximum) if form.scale_by == "peak" else _root_mean_square(w, scheme)
        scale = to_range(size, dtype)
        return dict(codes=encode(quotient(w, spread(scale.astype(jnp.float32))), form), scale=scale)
    total = quotient(jnp.max(amax, axis=(-2, -1)), _E4M3.maximum * form.maximum)
    total = jnp.where(total == 0, 1.0, total)
    scale = encode(quotient(quotient(amax, form.maximum), total[..., None, None]), _E4M3)
    step = spread(scale.astype(jnp.float32) * total[..., None, None])
    ratio = jnp.where(step == 0, 0.0, w / jnp.where(step == 0, 1.0, step))
    return dict(codes=encode(ratio, form), scale=scale, global_scale=total)


def _nested(scale: jax.Array, block: int) -> QTensor:
    """Double quantization of float32 scales `[..., R, C]`; formula in `qjax.schemes.NF4`."""
    columns = scale.shape[-1]
    shape = (max(1, block // columns), None) if columns <= block else (1, block)
    scheme = Scheme(spec=f"dynamic8:block={block}", weight="dynamic8", block=shape)
    offset = jax.lax.optimization_barrier(jnp.mean(scale, axis=(-2, -1)))  # the one that is kept is the one subtracted
    found = _scaled(scale - offset[..., None, None], scheme, np.dtype("float32"))
    return QTensor(found["codes"], found["scale"], offset=offset, scheme=scheme, k_piece=(1, 1))


@functools.partial(jax.jit, static_argnames=("scheme", "scale_dtype", "dtype", "pieces"))
def _quantize(
    w: jax.Array, given: jax.Array | None, scheme: Scheme, scale_dtype: np.dtype, dtype: np.dtype, pieces: int
) -> QTensor:
    """`[..., K, N]` -> QTensor; everything that needs a value was checked before."""
    w = w.astype(jnp.float32).swapaxes(-1, -2)
    if scheme.hadamard:
        w = rotate(w, scheme.hadamard)
    is_int = scheme.format.kind == "int"
    found = _integer(w, scheme, scale_dtype, given) if is_int else _scaled(w, scheme, scale_dtype)
    codes, scale = found.pop("codes"), found.pop("scale")
    nested = _nested(scale, scheme.nested) if scheme.nested else scale
    return from_codes(codes, nested, scheme, dtype=dtype, pieces=pieces, **found)


def from_codes(
    codes: jax.Array, scale: jax.Array | QTensor, scheme: Scheme, *, dtype: Any, pieces: int = 1, **arrays: Any
) -> QTensor:
    """A QTensor of codes `[..., N, K]` in the format's dtype and of scales, packed where the scheme packs.

    Args:
      codes, scale: as the QTensor's law reads them.
      scheme: what they mean.
      dtype: of `dequantize()`.
      pieces: as `k_pieces` of `quantize_array`.
      **arrays: further fields of QTensor.
    """
    k = codes.shape[-1]
    piece = k_pieces(k, scheme.bits, pieces)
    if scheme.bits < 8:
        codes = codes.reshape(*codes.shape[:-1], k // piece[0], piece[0])
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, piece[1] - piece[0])])
        codes = pack(codes.reshape(*codes.shape[:-2], k // piece[0] * piece[1]), scheme.bits)
    return QTensor(codes, scale, scheme=scheme, dtype=np.dtype(dtype), k_piece=piece, **arrays)


@jax.jit
def _survey(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many values are not finite, and how many are."""
    bad = jnp.sum(~jnp.isfinite(w.astype(jnp.float32)))
    return bad, w.size - bad


def refuse_shape(where: str, w: Any) -> None:
    """Raises QuantizeError where there is a ShapeDtypeStruct for an array."""
    if isinstance(w, jax.ShapeDtypeStruct):
        raise QuantizeError(f"{where}: {w} is a shape and no array; quantize inside of jax.eval_shape")


def check_kernel(where: str, w: Any, scheme: Scheme, partial_groups: bool, pieces: int) -> None:
    """Raises QuantizeError where dtype, shape, groups or pieces of a kernel `[..., K, N]` do not fit each other."""
    if not jnp.issubdtype(w.dtype, jnp.floating) or np.dtype(w.dtype).itemsize < 2:
        raise QuantizeError(
            f"{where}: dtype {w.dtype} cannot be quantized; allowed: float16, bfloat16, float32, float64"
        )
    if w.ndim < 2 or 0 in w.shape:
        raise QuantizeError(f"{where}: shape {tuple(w.shape)} is no kernel; (..., K, N) with K, N > 0 is")
    k, (block_n, block_k) = w.shape[-2], scheme.block
    if pieces < 1 or k % pieces:
        raise QuantizeError(f"{where}: K={k} cannot be cut into k_pieces={pieces}")
    if block_k and pieces > 1 and (k // pieces) % block_k:
        raise QuantizeError(f"{where}: a piece of K={k // pieces} cuts groups of {block_k} (k_pieces={pieces})")
    if scheme.hadamard and k % scheme.hadamard:
        largest = k & -k
        raise QuantizeError(
            f"{where}: hadamard_size={scheme.hadamard} does not divide K={k}; powers of two up to {largest} do"
        )
    # Blocks over rows and columns may be short at the edge, as in every FP8 block checkpoint.
    if block_k and k % block_k and block_n == 1 and not partial_groups:
        fits = [str(g) for g in (16, 32, 64, 128, 256) if k % g == 0]
        raise QuantizeError(
            f"{where}: group_size={block_k} does not divide K={k}; these do: {', '.join([*fits, '-1 (per channel)'])}; "
            "or partial_groups=True allows a short last group"
        )


def _check_scale(where: str, w: jax.Array, scheme: Scheme, scale: jax.Array | None) -> None:
    """Raises QuantizeError for a scale of another shape than that of `[..., K, N]`, or one that has no place."""
    if scale is None:
        return
    if not scheme.is_plain:
        raise QuantizeError(f"{where}: {scheme} makes its own scales; they can be given to symmetric integers")
    wanted = (*w.shape[:-2], *scale_shape(scheme, w.shape[-1], w.shape[-2]))
    if tuple(scale.shape) != wanted:
        raise QuantizeError(f"{where}: a scale of shape {tuple(scale.shape)}; {scheme} asks for {wanted}")


def quantize_array(
    w: jax.Array,
    scheme: Scheme | str,
    *,
    where: str = "kernel",
    partial_groups: bool = False,
    k_pieces: int = 1,
    dtype: Any = None,
    scale: jax.Array | None = None,
) -> QTensor:
    """Quantizes one kernel, to nearest.

    Args:
      w: float `[..., K, N]` as Flax stores it (leading axes are stacked kernels), on any device.
      scheme: a `Scheme` or its string.
      where: the path that errors name.
      partial_groups: allow a short last group where `group_size` does not divide K.
      k_pieces: pieces along K that are padded to 128 on their own, so that as many shards can hold one each.
      dtype: what `dequantize()` will return; default w's.
      scale: what symmetric integers are multiples of, `[..., N, G]`, instead of what the scheme's formula makes of w;
        rounded to the scheme's dtype.

    Returns:
      A QTensor of shape `w.shape`. Scales meant for float16 are float32 where one would be subnormal or infinite there;
      under a trace, where values cannot be looked at, they are clamped to float16's normal range.

    Raises:
      QuantizeError: wrong rank or dtype, a group that does not divide K, NaN or inf; a scale of another shape, or for
        another scheme.
    """
    scheme = as_scheme(scheme)
    refuse_shape(where, w)
    w = jnp.asarray(w)
    check_kernel(where, w, scheme, partial_groups, k_pieces)
    scale_dtype = np.dtype(getattr(jnp, scheme.scale_dtype))
    if not isinstance(w, jax.core.Tracer):
        bad, good = (int(v) for v in _survey(w))
        if bad:
            raise QuantizeError(f"{where}: {bad} of {bad + good} weights are NaN or inf")
        scale_dtype = scale_dtype if scale is not None else scale_dtype_of(w, scheme)
    _check_scale(where, w, scheme, scale)
    return _quantize(w, scale, scheme, scale_dtype, np.dtype(dtype or w.dtype), k_pieces)


@functools.partial(jax.jit, static_argnames="scheme")
def _scale_range(w: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Smallest nonzero and largest scale that `_integer` will want."""
    w = w.astype(jnp.float32).swapaxes(-1, -2)
    high, low = jnp.maximum(w, 0), jnp.minimum(w, 0)
    if scheme.symmetric:
        scale = reduce_blocks(jnp.abs(w), scheme.block, jnp.max) / scheme.format.maximum
    else:
        top = 2**scheme.bits - 1
        scale = reduce_blocks(high, scheme.block, jnp.max) / top - reduce_blocks(low, scheme.block, jnp.min) / top
    return jnp.min(jnp.where(scale == 0, jnp.inf, scale)), jnp.max(scale)


def scale_dtype_of(w: jax.Array, scheme: Scheme) -> np.dtype:
    """The scheme's dtype of scales; float32 for float16 where a scale would be subnormal or infinite.

    `w` `[..., K, N]` is no tracer: its values are looked at.
    """
    wanted: np.dtype = np.dtype(getattr(jnp, scheme.scale_dtype))
    return np.dtype("float32") if wanted == np.float16 and not _fits_float16(w, scheme) else wanted


def _fits_float16(w: jax.Array, scheme: Scheme) -> bool:
    low, high = (float(v) for v in _scale_range(w, scheme))
    info = jnp.finfo(jnp.float16)
    return low >= float(info.smallest_normal) and high <= float(info.max)
