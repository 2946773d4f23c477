"""How a product is cut over a mesh: names for the axes of its operands, and from where `packed` lies, specs for all.

Every array of a product carries axes `b0.. | m0.. | n | k` (stack, rows of x, outputs, contraction; K counts elements
in x, blocks of 128 in `packed`, groups in scales: one name, since a cut cuts all alike). The codes decide: rows of x
give up a mesh axis that the weight is cut by (FSDP), unless the packed fields weigh less than x; then they are gathered
instead. A dequantized weight never moves.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from qjax.errors import ShardingError
from qjax.layouts import BLOCK
from qjax.qtensor import QTensor

Labels = tuple[str | None, ...]
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axis names of a product's arrays, in the order of `jax.tree.leaves`.

    Attributes:
      x: of x's values; then of its scale, where it has one.
      w: of the weight's arrays, `packed` first.
      rest: of bias and residual, where given.
      result: of the product.
      inner: the contracted name, `k` (or `n`, transposed).
    """

    x: tuple[Labels, ...]
    w: tuple[Labels, ...]
    rest: tuple[Labels, ...]
    result: Labels
    inner: str

    @property
    def operands(self) -> tuple[Labels, ...]:
        """Of all operands."""
        return (*self.x, *self.w, *self.rest)


def weight_axes(w: QTensor, stack: Labels) -> tuple[Labels, ...]:
    """Axis names of a QTensor's arrays in the order of `jax.tree.leaves`; None for an axis that is never cut."""
    rows = (*stack, "n", "k")
    axes: list[Labels] = [(*rows, None) if w.is_packed else rows]
    axes += weight_axes(w.scale, stack) if isinstance(w.scale, QTensor) else [rows]
    if w.zero_point is not None:
        axes.append(rows)
    if w.global_scale is not None:
        axes.append((*stack, "n") if w.global_scale.ndim > len(stack) else stack)
    axes += [(*stack, None)] * (w.codebook is not None)
    axes += [stack] * (w.offset is not None)
    axes += [(*stack, "k")] * ((w.input_perm is not None) + (w.input_scale is not None))
    axes += [stack] * (w.act_scale is not None)
    return tuple(axes)


def product_axes(
    w: QTensor,
    *,
    stack: int,
    rows: int,
    transposed: bool,
    x_scale: bool,
    bias: bool,
    residual: bool,
) -> Axes:
    """Axis names of every array of a product with `stack` leading axes and `rows` row axes of x."""
    b: Labels = tuple(f"b{i}" for i in range(stack))
    m: Labels = tuple(f"m{i}" for i in range(rows))
    inner, outer = ("n", "k") if transposed else ("k", "n")
    x: Labels = (*b, *m, inner)
    y: Labels = (*b, *m, outer)
    rest = ((*b, outer),) * bias + (y,) * residual
    return Axes((x,) * (1 + x_scale), weight_axes(w, b), rest, y, inner)


def shardy_rule(axes: Axes, shapes: Sequence[tuple[int, ...]]) -> SdyShardingRule:
    """The same for XLA's propagation; an axis of size 1 beside longer ones of its name is a factor of its own."""
    fresh = (f"u{i}" for i in itertools.count())
    longest: dict[str, int] = {}
    for labels, shape in zip(axes.operands, shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            if label is not None:
                longest[label] = max(longest.get(label, 1), size)

    def mapping(labels: Labels, shape: tuple[int, ...]) -> ArrayMapping:
        return ArrayMapping(
            *(
                next(fresh) if n is None or (d == 1 and longest[n] > 1) else n
                for n, d in zip(labels, shape, strict=True)
            )
        )

    operands = tuple(mapping(n, s) for n, s in zip(axes.operands, shapes, strict=True))
    result = ArrayMapping(*axes.result)
    return SdyShardingRule(operands, (result,), reduction_factors=(axes.inner,))


def mesh_axes(entry: Any) -> Names:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def entries(spec: PartitionSpec | None, rank: int) -> tuple[Names, ...]:
    """A spec's mesh axes for each of `rank` array axes."""
    given = tuple(mesh_axes(e) for e in (spec or ()))
    return given + ((),) * (rank - len(given))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to cut one product: a spec for each operand and the result, and the mesh axes to sum over."""

    operands: tuple[PartitionSpec, ...]
    result: PartitionSpec
    sum_over: Names


def off_mesh[**P, R](f: Callable[P, R]) -> Callable[P, R]:
    """`f` on one shard, on no mesh: the partitioner traces it while the `jax.set_mesh` of its caller still holds."""

    @functools.wraps(f)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return f(*args, **kwargs)

    return run


def mesh_of(leaves: list[jax.Array]) -> tuple[Any, AxisType | None]:
    """The mesh that the arrays' types or the context name, and its one kind of axis (None: no mesh).

    Raises:
      NotImplementedError: a mesh of several kinds, partly manual ones among them.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in leaves]
    mesh = next((m for m in meshes if not m.empty), jax.sharding.get_abstract_mesh())
    kinds = set(mesh.axis_types) if not mesh.empty else set()
    if len(kinds) > 1:
        names = dict(zip(mesh.axis_names, (t.name for t in mesh.axis_types), strict=True))
        raise NotImplementedError(f"products on a mesh of mixed axis types {names}; make all Auto, Explicit or Manual")
    return mesh, next(iter(kinds), None)


def spec_of(labels: Labels, shape: tuple[int, ...], cut: Mapping[str, Names]) -> PartitionSpec:
    """The spec of one array: its named axes cut, but those of size 1, which broadcast."""
    return PartitionSpec(*(cut.get(n or "", ()) or None if d > 1 else None for n, d in zip(labels, shape, strict=True)))


def plan_product(
    axes: Axes,
    leaves: Sequence[Any],
    specs: Sequence[PartitionSpec | None],
    w: QTensor,
    mesh: Mapping[str, int],
) -> Plan:
    """Specs of a product from where its operands lie.

    Args:
      axes: names of the operands' axes.
      leaves: global shapes and dtypes of the operands (anything with `.shape`, `.dtype`), in that order.
      specs: where they lie now.
      w: the weight, for its blocks.
      mesh: sizes of the mesh's axes.

    Raises:
      ShardingError: a cut through a packed block or a scale group.
    """
    first = len(axes.x)
    packed = leaves[first]
    cut: dict[str, Names] = {}
    for label, names in zip(axes.w[0], entries(specs[first], len(packed.shape)), strict=True):
        if names and label is None:
            raise ShardingError(f"mesh axes {names} cut the words of a packed block: {axes.w[0]} of {packed.shape}")
        if label is not None:
            cut[label] = names
    taken = {name for names in cut.values() for name in names}
    where_x = zip(axes.x[0], entries(specs[0], len(leaves[0].shape)), strict=True)
    rows = {n: names for n, names in where_x if n is not None and n.startswith("m")}
    clash = taken & {name for names in rows.values() for name in names}
    if clash:
        weight_bytes = sum(_nbytes(a) for a in leaves[first : first + len(axes.w)])
        moves_x = _nbytes(leaves[0]) <= weight_bytes
        loser = rows if moves_x else cut
        loser.update({n: tuple(a for a in names if a not in clash) for n, names in loser.items()})
    cut |= rows
    parts = {n: math.prod(mesh[a] for a in cut.get(n, ())) for n in ("n", "k")}
    check_cut(w, parts, cut, f"a weight of shape {w.shape}")
    shapes = [tuple(a.shape) for a in leaves]
    operands = tuple(spec_of(n, s, cut) for n, s in zip(axes.operands, shapes, strict=True))
    result = PartitionSpec(*(cut.get(n or "", ()) or None for n in axes.result))
    return Plan(operands, result, cut.get(axes.inner, ()))


def _nbytes(a: Any) -> int:
    return math.prod(a.shape) * np.dtype(a.dtype).itemsize


def check_cut(w: QTensor, parts: Mapping[str, int], cut: Mapping[str, Names], where: str = "QTensor") -> None:
    """Raises unless `parts` equal parts along N and K cut no packed block, padded piece or scale block.

    Raises:
      ShardingError: naming mesh axis, parts, the shard's length and what it cuts.
    """
    logical, piece = w.k_piece
    for label, size, block in zip("nk", (w.out_features, w.in_features), w.scheme.block, strict=True):
        count = parts[label]
        if count == 1:
            continue
        what = f"{where}: {label.upper()}={size} over mesh axes {cut[label]} of {count} devices"
        if size % count:
            raise ShardingError(f"{what}: not equal parts")
        if block not in (None, 1) and (size // count) % block:
            fits = [g for g in (16, 32, 64, 128) if (size // count) % g == 0]
            raise ShardingError(
                f"{what}: a shard of {size // count} cuts scale groups of {block}; group sizes that fit: "
                f"{', '.join(map(str, fits)) or 'none'}, or one scale a channel"
            )
        if label == "k" and w.is_packed and (w.packed.shape[-2] * BLOCK // count) % piece:
            kind = "blocks of 128 codes" if logical == piece else f"padded pieces of {logical}"
            raise ShardingError(f"{what}: a shard of {size // count} cuts {kind}; quantize with k_pieces={count}")
    if isinstance(w.scale, QTensor):
        rows, columns = w.scale.out_features, w.scale.in_features
        check_cut(
            w.scale,
            {"n": parts["n"] if rows > 1 else 1, "k": parts["k"] if columns > 1 else 1},
            cut,
            f"{where}.scale",
        )


def all_specs(w: QTensor, stack: Sequence[Any], n: Any, k: Any) -> Any:
    """A QTensor of PartitionSpecs from those of its stack axes, N and K."""
    labels = weight_axes(w, tuple(f"b{i}" for i in range(len(stack))))
    cut = {f"b{i}": mesh_axes(e) for i, e in enumerate(stack)} | {
        "n": mesh_axes(n),
        "k": mesh_axes(k),
    }
    leaves, tree = jax.tree.flatten(w)
    return jax.tree.unflatten(
        tree, [spec_of(names, tuple(a.shape), cut) for names, a in zip(labels, leaves, strict=True)]
    )
