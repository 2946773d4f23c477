"""Attention of one new token a row, by a kernel that turns, stores and attends, cut over devices by rows and heads.

Where there is none, `qjax.models.llama.Attention` does the same in three steps of plain JAX; `plain_because` says when.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax import devices
from qjax.dispatch import backends
from qjax.dispatch.backends import Selection
from qjax.dispatch.choose import load_if_present
from qjax.dispatch.routes import GPU, Route
from qjax.models.kv_cache import LayerCache
from qjax.partition import entries, mesh_of, off_mesh

KERNEL = Route(
    "triton.decode_attention", "triton", "pallas_kernels.triton.decode_attention", platforms=GPU, cc_min=80
)  # fmt: skip


def plain_because(length: int, heads: int, dtype: Any, cache: LayerCache | None) -> str | None:
    """Why plain JAX attends, or None where the kernel does.

    Args:
      length: tokens a row.
      heads: query heads.
      dtype: of queries, keys and values.
      cache: of the layer.
    """
    if cache is None or length != 1:
        return f"the kernel attends from one token to a cache; here are {length}, a cache: {cache is not None}"
    device, asked = devices.current(), backends.override.value
    if asked is not None and (backends.selection(asked) or Selection(None)).backend not in (None, KERNEL.backend):
        return f"{asked} was asked for"
    if device.platform not in GPU or device.cc < KERNEL.cc_min:
        return f"the kernel is for NVIDIA GPUs from compute capability {KERNEL.cc_min / 10} on; this is {device}"
    module = load_if_present(KERNEL)
    if module is None:
        return f"{KERNEL.module} is absent or does not import"
    return module.unsupported(
        heads=heads, cache=cache.keys.shape, dtype=dtype, cache_dtype=cache.keys.dtype,
        smem=device.shared.smem_block, cc=device.cc,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static: scale of the scores, their cap, how many slots a token sees."""

    scale: float
    softcap: float | None
    window: int | None


# queries, keys, values, cos, sin, positions, and the cache's two or four -> attended, and the cache's
Arrays = tuple[jax.Array, ...]
_CACHE = 6  # operands before the cache's


def decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of one token a row, where `plain_because` has no objection.

    Args:
      queries: `[B, 1, H * D]`, not turned yet; keys, values: `[B, 1, kv_heads * D]`.
      cos, sin: float32 `[B, 1, D / 2]` of the rotary embedding.
      positions: int32 `[B, 1]`.
      cache: takes up the key and the value.
      scale, softcap, window: as `qjax.models.llama.attend` and `causal_mask`.

    Returns:
      `[B, 1, H * D]`, and the cache after.
    """
    operands = queries, keys, values, cos, sin, positions, *jax.tree.leaves(cache)
    attended, *after = _batchable(_Call(scale, softcap, window))(*operands)
    return attended, LayerCache(*after)


@functools.cache
def _batchable(call: _Call) -> Any:
    @custom_vmap
    def attend(*operands: jax.Array) -> Arrays:
        _, kind = mesh_of(list(operands))
        assert kind != AxisType.Explicit, "Llama's methods treat Explicit axes as Auto ones"
        if kind == AxisType.Manual:
            return _local(call, *operands)
        return _auto(
            call, operands[0].shape[-1] // operands[1].shape[-1], operands[_CACHE].shape, len(operands) - _CACHE
        )(*operands)

    @attend.def_vmap
    def batched(size: int, in_batched: list[bool], *operands: jax.Array) -> tuple[Arrays, tuple[bool, ...]]:
        del size
        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(functools.partial(_local, call), in_axes=axes)(*operands), (True,) * (
            len(operands) - _CACHE + 1
        )

    return attend


def _local(call: _Call, *operands: jax.Array) -> Arrays:
    """The arrays at hand."""
    queries, keys, values, *angles_and_positions = operands[:_CACHE]
    module, device = load_if_present(KERNEL), devices.current()
    assert module is not None, "the caller has asked plain_because"
    row = jnp.concatenate([queries, keys, values], axis=-1)  # XLA sees through it where they are slices of one product
    attended, *cache = module.decode_attention(
        row[:, 0], *(a[:, 0] for a in angles_and_positions), *operands[_CACHE:],
        **dataclasses.asdict(call), sms=device.sms, smem=device.shared.smem_block,
    )  # fmt: skip
    return attended[:, None], *cache


@functools.cache
def _auto(call: _Call, group: int, cache: tuple[int, ...], arrays: int) -> Any:
    """Under XLA's partitioner, for `group` query heads to each head of a cache of this shape, in two arrays or four."""

    def whole(*operands: jax.Array) -> Arrays:
        return _local(call, *operands)

    def partition(mesh: Any, arguments: tuple[Any, ...], results: Any) -> Any:
        del results
        batch, heads = (
            names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
            for names, size in zip(entries(arguments[_CACHE].sharding.spec, 4), cache[:2], strict=False)
        )
        b, j = batch or None, heads or None
        by_head, by_row, slots = PartitionSpec(b, None, j), PartitionSpec(b), PartitionSpec(b, j)
        specs = (by_head, by_head, by_head, by_row, by_row, by_row, *(slots,) * arrays)
        placed = tuple(NamedSharding(mesh, spec) for spec in specs)
        return mesh, off_mesh(functools.partial(_local, call)), (placed[0], *placed[_CACHE:]), placed

    _, kv_heads, _, head_dim = cache
    sizes = {"j": kv_heads, "g": group, "d": head_dim}

    def joined(*names: str) -> CompoundFactor | str:
        """Heads and their numbers as one axis: Shardy wants no factor of size 1 among several."""
        some = [name for name in names if sizes[name] > 1]
        return CompoundFactor(*some) if len(some) > 1 else some[0]

    queries = ArrayMapping("b", "s", joined("j", "g", "d"))
    token, angle = ArrayMapping("b", "s", joined("j", "d")), ArrayMapping("b", "s", "half")
    slots = ArrayMapping("b", "j", "t", "d")
    scales = ArrayMapping("b", "j", "t")
    after = (slots, slots, scales, scales)[:arrays]
    operands = (queries, token, token, angle, angle, ArrayMapping("b", "s"), *after)
    only_joined: Any = {"g": group} if group > 1 else {}
    rule = SdyShardingRule(operands, (queries, *after), **only_joined)
    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned
