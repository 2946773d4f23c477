"""x -> `Rows` by the kernel that dispatch chooses, cut over devices as x is; else by the formula, as XLA compiles it.

A row's scale is that of the whole row: a kernel runs where K is whole, or cut between scales (`block`); where K is cut
through them each device takes the formula, and `pmax` joins largest magnitudes. As in `qjax.product` a batch is more
rows, and the kind of mesh says how to cut: Auto by custom_partitioning, Explicit by a shard_map, Manual not at all.
"""

import functools
import math
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.activations import BLOCK_K, Rows, quantize_rows
from qjax.dispatch.choose import load
from qjax.dispatch.quantizer import choose_quantizer, unit_of
from qjax.dispatch.routes import Quantizer
from qjax.formats import FORMATS
from qjax.partition import entries, mesh_of, off_mesh
from qjax.schemes import Activation

Parts = tuple[jax.Array, jax.Array]  # codes `[..., K]`, scale `[..., C]`


def quantized(x: jax.Array, activation: Activation | None, act_scale: jax.Array | None, backend: str | None) -> Rows:
    """x as the scheme asks for it.

    Args:
      backend: the product's, as the user gave it.
      (others: of `qjax.activations.quantize_rows`)
    """
    row = None if activation is None or x.size == 0 else choose_quantizer(activation, x.shape[-1], backend=backend)
    if row is None or activation is None:
        return quantize_rows(x, activation, act_scale)
    return Rows(*_batchable(row, activation)(x))


@functools.cache
def _batchable(row: Quantizer, activation: Activation) -> Any:
    @custom_vmap
    def quantize(x: jax.Array) -> Parts:
        mesh, kind = mesh_of([x])
        if kind == AxisType.Manual:
            return _local(row, activation, (), x)
        if kind == AxisType.Explicit:
            spec, results, k_over = _cut(activation, x.shape, jax.typeof(x).sharding.spec, mesh)
            one = functools.partial(_local, row, activation, k_over)
            placed = jax.sharding.reshard(x, NamedSharding(mesh, spec))
            return jax.shard_map(one, mesh=mesh, in_specs=(spec,), out_specs=results, check_vma=False)(placed)
        return _auto(row, activation, x.ndim)(x)

    @quantize.def_vmap
    def batched(size: int, in_batched: tuple[bool], x: jax.Array) -> tuple[Parts, tuple[bool, bool]]:
        del size, in_batched  # x is all there is: it is batched
        return quantize(x), (True, True)

    return quantize


def _local(row: Quantizer, activation: Activation, k_over: tuple[str, ...], x: jax.Array) -> Parts:
    """The rows at hand."""
    if k_over or x.size == 0:
        rows = quantize_rows(x, activation, None, k_over)
        assert rows.scale is not None
        return rows.values, rows.scale
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    unit = unit_of(activation, x.shape[-1])
    codes, scale = load(row).quantize_rows(flat, FORMATS[activation.format].dtype, unit)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], scale.shape[-1])


def _cut(
    activation: Activation, shape: tuple[int, ...], spec: PartitionSpec | None, mesh: Any
) -> tuple[PartitionSpec, tuple[PartitionSpec, PartitionSpec], tuple[str, ...]]:
    """Specs of x and of both results, and the mesh axes that cut K through scales."""
    *rows, over = entries(spec, len(shape))
    if activation.granularity == "token":
        x = PartitionSpec(*(names or None for names in rows), over or None)
        return x, (x, PartitionSpec(*(names or None for names in rows))), over
    whole = shape[-1] % (math.prod(mesh.shape[name] for name in over) * BLOCK_K) == 0
    x = PartitionSpec(*(names or None for names in rows), (over or None) if whole else None)
    return x, (x, x), ()


@functools.cache
def _auto(row: Quantizer, activation: Activation, rank: int) -> Any:
    """Under XLA's partitioner."""

    def whole(x: jax.Array) -> Parts:
        return _local(row, activation, (), x)

    def partition(mesh: Any, arguments: tuple[Any], results: Any) -> Any:
        del results
        (x,) = arguments
        spec, found, k_over = _cut(activation, x.shape, x.sharding.spec, mesh)
        placed = [NamedSharding(mesh, one) for one in (spec, *found)]
        one = off_mesh(functools.partial(_local, row, activation, k_over))
        return mesh, one, tuple(placed[1:]), tuple(placed[:1])

    partitioned = custom_partitioning(whole)
    names = [f"m{i}" for i in range(rank - 1)]
    like_x = ArrayMapping(*names, "k")
    scale = ArrayMapping(*names, "c" if activation.granularity == "token" else "k")
    partitioned.def_partition(partition, sharding_rule=SdyShardingRule((like_x,), (like_x, scale)))
    return partitioned
