"""One product for every transformation: `custom_vmap(partitioned(local kernel))`; `qjax.matmul` adds the gradient.

The nesting matters: a custom_vmap outside of a custom_vjp fails under `grad`. Batching x adds a row axis; batching the
weight adds a stack axis, over which one kernel call runs. How a product is cut over devices follows from where `packed`
lies (`qjax.partition`), by the kind of mesh:

    Auto           custom_partitioning with a Shardy rule: XLA's partitioner calls back (`qjax.lowered`)
    Explicit       shard_map built from the operands' types
    Manual         the local kernel: the caller's shard_map has cut the arrays

Where K is cut, local products are summed in float32 and the epilogue follows the sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding

from qjax.activations import Rows
from qjax.epilogue import apply_epilogue
from qjax.kernel_call import call_kernel
from qjax.lowered import call_lowered
from qjax.partition import Axes, Plan, mesh_of, off_mesh, plan_product, product_axes, shardy_rule
from qjax.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a product.

    Attributes:
      stack: leading axes that x and the weight share (x may have 1 there, which broadcasts).
      transposed: multiply by the transpose of the weight.
      activation: a key of `qjax.epilogue.ACTIVATIONS`, or None.
      out_dtype: of the result.
      backend: the user's choice, or None.
    """

    stack: int
    transposed: bool
    activation: str | None
    out_dtype: np.dtype
    backend: str | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """The arrays of a product.

    Attributes:
      x: `[*stack, *rows, K]` (`N` if transposed).
      w: the weight, without what belongs to x (`input_perm`, `input_scale`, `act_scale`).
      bias: `[*stack, N]`.
      residual: shaped like the result `[*stack, *rows, N]`.
    """

    x: Rows
    w: QTensor
    bias: jax.Array | None = None
    residual: jax.Array | None = None


def _local(call: Call, o: Operands, *, raw: bool = False) -> jax.Array:
    """The product of the arrays at hand, on one device. `raw`: float32 without the epilogue, to be summed."""
    rows = o.x.values.shape[call.stack : -1]

    def flat(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[: call.stack], math.prod(rows), a.shape[-1])

    y = call_kernel(
        jax.tree.map(flat, o.x),
        o.w,
        bias=None if raw else o.bias,
        activation=None if raw else call.activation,
        residual=None if raw or o.residual is None else flat(o.residual),
        out_dtype=np.dtype("float32") if raw else call.out_dtype,
        transposed=call.transposed,
        backend=call.backend,
    )
    return y.reshape(*y.shape[:-2], *rows, y.shape[-1])


def _local_once(platform: str, call: Call, o: Operands, *, raw: bool = False) -> jax.Array:
    """`_local`, lowered once for all products alike."""
    leaves, tree = jax.tree.flatten(o)

    def local(*leaves: jax.Array) -> jax.Array:
        return _local(call, jax.tree.unflatten(tree, leaves), raw=raw)

    return call_lowered(local, (call, raw, tree), leaves, platform)


def _finish(call: Call, o: Operands, y: jax.Array) -> jax.Array:
    """The epilogue outside of a kernel."""
    bias = o.bias
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-1], *(1,) * (y.ndim - bias.ndim), bias.shape[-1])
    return apply_epilogue(y, bias, call.activation, o.residual, call.out_dtype)


def _one_shard(call: Call, plan: Plan, o: Operands, local: Callable[..., jax.Array] = _local) -> jax.Array:
    """What each device does: its product, and where K is cut the sum over those that hold the rest."""
    if not plan.sum_over:
        return local(call, o)
    return _finish(call, o, jax.lax.psum(local(call, o, raw=True), plan.sum_over))


def _axes(call: Call, o: Operands) -> Axes:
    return product_axes(
        o.w,
        stack=call.stack,
        rows=o.x.values.ndim - call.stack - 1,
        transposed=call.transposed,
        x_scale=o.x.scale is not None,
        bias=o.bias is not None,
        residual=o.residual is not None,
    )


@functools.cache
def _auto(call: Call, tree: Any, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Any:
    """The product under XLA's partitioner, for operands of one structure and one set of shapes."""
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    o: Operands = jax.tree.unflatten(tree, leaves)
    axes = _axes(call, o)

    def partition(mesh: Any, arguments: tuple[Operands], result: Any) -> Any:
        del result
        specs = [a.sharding.spec for a in jax.tree.leaves(arguments)]
        plan = plan_product(axes, leaves, specs, o.w, dict(mesh.shape))
        placed = jax.tree.unflatten(tree, [NamedSharding(mesh, spec) for spec in plan.operands])
        local = functools.partial(_local_once, mesh.devices.flat[0].platform)

        return (
            mesh,
            off_mesh(functools.partial(_one_shard, call, plan, local=local)),
            NamedSharding(mesh, plan.result),
            (placed,),
        )

    def whole(o: Operands) -> jax.Array:
        return _local(call, o)

    partitioned = custom_partitioning(whole)
    partitioned.def_partition(partition, sharding_rule=shardy_rule(axes, [shape for shape, _ in shapes]))
    return partitioned


def _explicit(call: Call, o: Operands, mesh: Any) -> jax.Array:
    """The product on a mesh of Explicit axes: where everything lies is in its type."""
    leaves, tree = jax.tree.flatten(o)
    specs = [jax.typeof(a).sharding.spec for a in leaves]
    plan = plan_product(_axes(call, o), leaves, specs, o.w, dict(mesh.shape))
    placed = [jax.sharding.reshard(a, NamedSharding(mesh, spec)) for a, spec in zip(leaves, plan.operands, strict=True)]
    cut = jax.shard_map(
        functools.partial(_one_shard, call, plan),
        mesh=mesh,
        in_specs=(jax.tree.unflatten(tree, plan.operands),),
        out_specs=plan.result,
        check_vma=False,
    )
    return cut(jax.tree.unflatten(tree, placed))


def check_placed(call: Call, o: Operands) -> None:
    """Plans a product of arrays that are at hand and lie on a mesh, to see whether it can be cut so.

    On Auto axes XLA's partitioner cuts the product, and an error from there would be wrapped in one of XLA's. Under a
    trace, where nobody knows yet where such arrays will lie, this does nothing.

    Raises:
      ShardingError: as `plan_product`.
    """
    leaves = jax.tree.leaves(o)
    if any(isinstance(a, jax.core.Tracer) or not isinstance(a, jax.Array) for a in leaves):
        return
    home = o.w.packed.sharding
    if isinstance(home, NamedSharding):
        specs = [getattr(a.sharding, "spec", None) for a in leaves]
        plan_product(_axes(call, o), leaves, specs, o.w, dict(home.mesh.shape))


def _dispatch(call: Call, o: Operands) -> jax.Array:
    """One product, cut as the mesh asks."""
    leaves, tree = jax.tree.flatten(o)
    mesh, kind = mesh_of(leaves)
    if kind == AxisType.Manual:
        return _local(call, o)
    if kind == AxisType.Explicit:
        return _explicit(call, o, mesh)
    return _auto(call, tree, tuple((tuple(a.shape), np.dtype(a.dtype)) for a in leaves))(o)


def _over_weights(call: Call, size: int, at: Operands, o: Operands) -> jax.Array:
    """A batch of weights: a stack axis in front of every array; an x that is not batched broadcasts."""

    def full(is_batched: bool, a: jax.Array) -> jax.Array:
        return a if is_batched else jnp.broadcast_to(a, (size, *a.shape))

    x = jax.tree.map(lambda is_batched, a: a if is_batched else a[None], at.x, o.x)
    rest = jax.tree.map(full, (at.w, at.bias, at.residual), (o.w, o.bias, o.residual))
    return product(dataclasses.replace(call, stack=call.stack + 1))(Operands(x, *rest))


def _over_rows(call: Call, size: int, at: Operands, o: Operands) -> jax.Array:
    """A batch of x on one weight: a row axis behind the stack."""

    def row(is_batched: bool, a: jax.Array) -> jax.Array:
        if is_batched:
            return jnp.moveaxis(a, 0, call.stack)
        return jnp.broadcast_to(jnp.expand_dims(a, call.stack), (*a.shape[: call.stack], size, *a.shape[call.stack :]))

    x, residual = jax.tree.map(row, (at.x, at.residual), (o.x, o.residual))
    return jnp.moveaxis(product(call)(Operands(x, o.w, o.bias, residual)), call.stack, 0)


@functools.cache
def product(call: Call) -> Any:
    """The batchable product of one `Call`: `Operands -> [*stack, *rows, N]` (K if transposed)."""

    @custom_vmap
    def multiply(o: Operands) -> jax.Array:
        return _dispatch(call, o)

    @multiply.def_vmap
    def batched(size: int, in_batched: tuple[Operands], o: Operands) -> tuple[jax.Array, bool]:
        (at,) = in_batched
        if any(jax.tree.leaves(at.w)):
            return _over_weights(call, size, at, o), True
        if any(jax.tree.leaves(at.x)) and not at.bias:
            return _over_rows(call, size, at, o), True
        # A bias for each example, or only epilogue operands: no kernel's epilogue does that, so it follows the product.
        raw = dataclasses.replace(call, activation=None, out_dtype=np.dtype("float32"))
        axes = [jax.tree.map(lambda b: 0 if b else None, t) for t in (at.x, at.bias, at.residual)]

        def one(x: Rows, bias: jax.Array | None, residual: jax.Array | None) -> jax.Array:
            return _finish(call, Operands(x, o.w, bias, residual), product(raw)(Operands(x, o.w)))

        return jax.vmap(one, in_axes=tuple(axes))(o.x, o.bias, o.residual), True

    return multiply
