"""QTensor: a quantized weight as a pytree. Its law, its shapes, its validation; no arithmetic.

    w[k, n] = (code[n, k] - zero_point[n', k']) * scale[n', k'] * global_scale        integer and float codes
    w[k, n] = (codebook[code[n, k]] * scale[n', k']) * global_scale + offset          codebook codes

with n' = n // block_n and k' = k // block_k, and k rotated where the scheme has a `hadamard`.

JAX rebuilds a QTensor around tracers, shapes, specs and placeholders, so
`__init__` checks nothing: `validate_qtensor` does, at the door. Shapes are computed from the arrays, never stored: a
scan, vmap or shard_map slices arrays and not static fields.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QTensorError
from qjax.layouts import BLOCK, padded
from qjax.schemes import Scheme

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized weight of logical shape `(..., K, N)`, stored by rows of K.

    Attributes:
      packed: the codes; below 8 bits uint32 `[..., N, ceil(K/128), 4*bits]` (`qjax.layouts`), else `[..., N, K]` of the
        format's dtype (int8 codes are signed).
      scale: multiplies; `[..., ceil(N/block_n), ceil(K/block_k)]`, an array or (double quantization) a QTensor whose
        logical shape is the transpose of that.
      zero_point: in code units, shaped like `scale`; int8, or a float (HQQ). None is the format's middle.
      global_scale: NVFP4's second level, float32 `[...]` or `[..., N]`; multiplies.
      codebook: float32 `[..., 2^bits]`, where it is not the format's own.
      offset: float32 `[...]`, added after scaling (bitsandbytes' nested scales).
      input_perm: int32 `[..., K]` (act-order): row k of storage belongs to column `input_perm[k]` of x.
      input_scale: `[..., K]`, multiplies x before the permutation (AWQ, SmoothQuant).
      act_scale: float32 `[...]`, the static scale of x.
      scheme: what the arrays mean. Static, like all below.
      dtype: what `dequantize()` returns.
      k_piece: `(logical, padded)` length along K of one piece: of all of K, or of one shard of it; `(128, 128)` where
        nothing is padded (`(1, 1)` at 8 bits), since any cut between blocks is then a right one.
      in_shape, out_shape: K and N as several axes, where the Flax kernel has them.
      axes: order of the Flax kernel's axes among `(*in_shape, *out_shape)`, where it is another.
    """

    packed: jax.Array
    scale: "jax.Array | QTensor"
    zero_point: jax.Array | None = None
    global_scale: jax.Array | None = None
    codebook: jax.Array | None = None
    offset: jax.Array | None = None
    input_perm: jax.Array | None = None
    input_scale: jax.Array | None = None
    act_scale: jax.Array | None = None
    scheme: Scheme = dataclasses.field(metadata=_STATIC, kw_only=True)
    dtype: np.dtype = dataclasses.field(metadata=_STATIC, kw_only=True, default=np.dtype("float32"))
    k_piece: tuple[int, int] = dataclasses.field(metadata=_STATIC, kw_only=True)
    in_shape: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC, kw_only=True, default=None)
    out_shape: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC, kw_only=True, default=None)
    axes: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC, kw_only=True, default=None)

    @property
    def is_packed(self) -> bool:
        """Whether codes are packed into words (below 8 bits)."""
        return self.scheme.bits < 8

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes: stacked layers, experts."""
        return tuple(self.packed.shape[: -3 if self.is_packed else -2])

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[-3 if self.is_packed else -2]

    @property
    def in_features(self) -> int:
        """K, padding not counted."""
        stored = self.packed.shape[-2] * BLOCK if self.is_packed else self.packed.shape[-1]
        logical, piece = self.k_piece
        return stored * logical // piece

    @property
    def shape(self) -> tuple[int, ...]:
        """The Flax kernel's shape: `(*stack, K, N)`, K and N as the axes that it has there."""
        tail = (*(self.in_shape or (self.in_features,)), *(self.out_shape or (self.out_features,)))
        if self.axes is not None:
            tail = tuple(tail[a] for a in self.axes)
        return (*self.stack_shape, *tail)

    @property
    def ndim(self) -> int:
        """Rank of the logical shape."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical weights."""
        return math.prod(self.stack_shape) * self.in_features * self.out_features

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: codes with their padding, scales, zero points and the rest."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over `size`."""
        return 8 * self.nbytes / max(self.size, 1)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight as one array of `shape`, in `dtype` (default: `self.dtype`), computed in float32."""
        from qjax.dequantize import dequantize

        return dequantize(self, dtype)

    def __repr__(self) -> str:
        try:
            shape, size = (
                self.shape,
                f"{self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits/weight",
            )
        except (
            AttributeError,
            TypeError,
            ValueError,
            ZeroDivisionError,
        ):  # placeholders: specs, None, object()
            fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)[:9])
            return f"QTensor({self.scheme}, " + ", ".join(f"{n}={v!r}" for n, v in fields if v is not None) + ")"
        return f"QTensor({self.scheme}, shape={shape}, dtype={self.dtype.name}, {size})"

    def _repr_html_(self) -> str:
        from qjax.display import to_html

        return to_html(self)

    def __treescope_repr__(self, path: str, subtree_renderer: Any) -> Any:
        from qjax.display import to_treescope

        return to_treescope(self, path, subtree_renderer)


def is_qtensor(leaf: object) -> bool:
    """For `is_leaf=` of tree functions that should see a QTensor whole."""
    return isinstance(leaf, QTensor)


def scale_shape(scheme: Scheme, n: int, k: int) -> tuple[int, int]:
    """Shape of the scales of an `[N, K]` tensor."""
    block_n, block_k = scheme.block
    return (1 if block_n is None else -(-n // block_n), 1 if block_k is None else -(-k // block_k))


def k_pieces(k: int, bits: int, pieces: int) -> tuple[int, int]:
    """`QTensor.k_piece` of K cut into equal pieces, each padded on its own.

    Raises:
      QTensorError: if `pieces` does not divide K.
    """
    if pieces < 1 or k % pieces:
        raise QTensorError(f"K={k} cannot be cut into k_pieces={pieces} equal pieces")
    if bits == 8:
        return (1, 1)
    piece = k // pieces
    return (piece, padded(piece)) if piece % BLOCK else (BLOCK, BLOCK)


def _want(where: str, field: str, got: Any, shape: Sequence[int], dtypes: tuple[str, ...] | None = None) -> None:
    if tuple(got.shape) != tuple(shape):
        raise QTensorError(
            f"{where}: {field} has shape {tuple(got.shape)}; the codes and the scheme ask for {tuple(shape)}"
        )
    if dtypes is not None and np.dtype(got.dtype).name not in dtypes:
        raise QTensorError(f"{where}: {field} has dtype {np.dtype(got.dtype).name}; allowed: {', '.join(dtypes)}")


_FLOATS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu")


def validate_qtensor(w: QTensor, where: str = "QTensor") -> QTensor:
    """Checks that a QTensor's arrays agree with each other and with its scheme; returns it.

    Args:
      w: arrays or ShapeDtypeStructs; values are not looked at.
      where: the path that errors name.

    Raises:
      QTensorError: naming the field, its shape or dtype, and the one that would be right.
    """
    packed, form = w.packed, w.scheme.format
    _want(where, "packed", packed, packed.shape, ("uint32",) if w.is_packed else (form.dtype.name,))
    rank = 3 if w.is_packed else 2
    if len(packed.shape) < rank or (w.is_packed and packed.shape[-1] != 4 * form.bits):
        tail = f"N, K/128, {4 * form.bits}" if w.is_packed else "N, K"
        raise QTensorError(f"{where}: packed has shape {tuple(packed.shape)}; {w.scheme} asks for [..., {tail}]")
    stored = packed.shape[-2] * BLOCK if w.is_packed else packed.shape[-1]
    logical, piece = w.k_piece
    if logical < 1 or piece < 1 or stored % piece or piece != (padded(logical) if w.is_packed else logical):
        raise QTensorError(f"{where}: k_piece={w.k_piece} does not fit packed of {stored} codes a row")
    stack, n, k = w.stack_shape, w.out_features, w.in_features
    rows, columns = scale_shape(w.scheme, n, k)
    if isinstance(w.scale, QTensor):
        validate_qtensor(w.scale, f"{where}.scale")
        _want(where, "scale", w.scale, (*stack, columns, rows))
    else:
        _want(where, "scale", w.scale, (*stack, rows, columns), _FLOATS)
    if w.zero_point is not None:
        _want(
            where,
            "zero_point",
            w.zero_point,
            (*stack, rows, columns),
            ("int8", "float16", "bfloat16", "float32"),
        )
    if w.global_scale is not None:
        by_row = tuple(w.global_scale.shape) == (*stack, n)
        _want(where, "global_scale", w.global_scale, (*stack, n) if by_row else stack, ("float32",))
    if w.codebook is not None:
        if form.dims > 1:
            raise QTensorError(f"{where}: a codebook is for formats of one value a code; {form.name} has points")
        _want(where, "codebook", w.codebook, (*stack, 2**form.bits), ("float32",))
    along_k = (*stack, k)
    for field, shape in dict(offset=stack, act_scale=stack, input_perm=along_k, input_scale=along_k).items():
        array = getattr(w, field)
        if array is not None:
            _want(where, field, array, shape, ("int32",) if field == "input_perm" else None)
    if math.prod(w.in_shape or (k,)) != k or math.prod(w.out_shape or (n,)) != n:
        raise QTensorError(f"{where}: in_shape={w.in_shape}, out_shape={w.out_shape} do not multiply to K={k}, N={n}")
    axes = len(w.in_shape or (k,)) + len(w.out_shape or (n,))
    if w.axes is not None and sorted(w.axes) != list(range(axes)):
        raise QTensorError(f"{where}: axes={w.axes} is no order of the {axes} axes of a kernel")
    return w


def concat_rows(parts: Sequence[QTensor], *, shares: int = 1) -> QTensor:
    """Merges QTensors that meet the same x (q, k and v; gate and up) along N, without touching a code.

    Scales of a whole tensor, global ones too, become scales of rows; a missing zero point is filled in where another
    part has one.

    Args:
      parts: of one scheme, K, dtype and stack; `[..., K, N_i]`.
      shares: cuts every N_i into so many equal ranges, and the result holds the first ranges of all parts, then the
        second ones: cut into as many, it gives each device its own range of every part.

    Returns:
      `[..., K, sum(N_i)]`.

    Raises:
      QTensorError: where the parts cannot share one tensor, with the field that differs.
    """
    if not parts:
        raise QTensorError("concat_rows needs at least one part")
    uneven = [part.out_features for part in parts if part.out_features % shares]
    if uneven:
        raise QTensorError(f"parts of N={uneven} have no {shares} equal shares")
    first = parts[0]
    for i, part in enumerate(parts):
        if (part.global_scale is None) != (first.global_scale is None):
            raise QTensorError(f"part {i} and part 0: one has a global_scale, the other none")
        for field in ("scheme", "k_piece", "dtype", "stack_shape", "in_features"):
            if getattr(part, field) != getattr(first, field):
                raise QTensorError(f"part {i} differs in {field}: {getattr(part, field)} and {getattr(first, field)}")
        for field in ("input_perm", "input_scale", "act_scale", "codebook", "offset"):
            mine, theirs = getattr(part, field), getattr(first, field)
            if mine is not theirs and (mine is None or theirs is None or not bool(jnp.array_equal(mine, theirs))):
                raise QTensorError(f"part {i} differs from part 0 in {field}: they need different x")
    return dataclasses.replace(first, **_merged(parts, shares), out_shape=None, axes=None)


def concat_shares(arrays: Sequence[jax.Array], *, axis: int, shares: int) -> jax.Array:
    """Concatenates along an axis, share by share: of `shares` equal ranges the first of every array come first."""
    if shares == 1:
        return jnp.concatenate(arrays, axis)
    cut = [a.reshape(*a.shape[:axis], shares, -1, *a.shape[axis + 1 :]) for a in arrays]
    whole = jnp.concatenate(cut, axis + 1)
    return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


def _merged(parts: Sequence[QTensor], shares: int) -> dict[str, Any]:
    """The arrays of `concat_rows`, and the scheme where its block grows rows."""
    first = parts[0]
    scheme, axis = first.scheme, len(first.stack_shape)
    cat = functools.partial(concat_shares, axis=axis, shares=shares)
    if any(isinstance(p.scale, QTensor) for p in parts):
        raise QTensorError("parts with double-quantized scales cannot be merged: their blocks run over rows")
    block_n = scheme.block[0]
    ranges = [p.out_features // shares for p in (parts[:-1] if shares == 1 else parts)]
    if block_n is not None and block_n > 1 and any(size % block_n for size in ranges):
        raise QTensorError(f"parts of N={[p.out_features for p in parts]} cut blocks of {block_n} rows")

    def by_row(part: QTensor, leaf: jax.Array) -> jax.Array:
        if block_n is not None:
            return leaf
        return jnp.broadcast_to(leaf, (*leaf.shape[:-2], part.out_features, leaf.shape[-1]))

    def zero(part: QTensor) -> jax.Array:
        if part.zero_point is not None:
            return part.zero_point
        return jnp.full(part.scale.shape, scheme.format.zero, jnp.int8)

    def global_rows(part: QTensor) -> jax.Array:
        level = part.global_scale
        assert level is not None, "one scheme, one set of fields"
        rows = level[..., None] if level.ndim == axis else level
        return jnp.broadcast_to(rows, (*part.stack_shape, part.out_features))

    fields: dict[str, Any] = dict(
        packed=cat([p.packed for p in parts]),
        scale=cat([by_row(p, p.scale) for p in parts]),  # type: ignore[arg-type]
    )
    if any(p.zero_point is not None for p in parts):
        fields["zero_point"] = cat([by_row(p, zero(p)) for p in parts])
    if first.global_scale is not None:
        fields["global_scale"] = cat([global_rows(p) for p in parts])
    if block_n is None:
        fields["scheme"] = dataclasses.replace(scheme, block=(1, scheme.block[1]))
    return fields
