"""QParam: the nnx Variable that holds a QTensor, and how a float `nnx.Param` becomes one.

A QParam is no `nnx.Param`: `nnx.grad` and optimizers, which take those, pass it by. Its sharding metadata speaks of the
Flax kernel, one spec for all of it; the specs of the arrays inside follow from that one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.errors import QTensorError, QuantizeError
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.partition import entries
from qjax.qtensor import QTensor
from qjax.schemes import Scheme
from qjax.sharding import shardings, specs

_HOOKS = ("on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis")


class QParam(nnx.Variable[QTensor]):
    """A frozen, quantized kernel; `get_value()` is the QTensor, and its fields are attributes (`kernel.scheme`).

    Args:
      value: the QTensor; it stays on the devices where it lies.
      **metadata: as of any Variable; `out_sharding` is the spec of the Flax kernel, over the axes of `value.shape`.
    """

    def __init__(self, value: QTensor, **metadata: Any) -> None:
        super().__init__(value, **(metadata | {"ref": False, "eager_sharding": False}))

    def replace(self, *value: Any, **updates: Any) -> nnx.Variable:
        """A copy, with another value where one is given."""
        return super().replace(*(self._for_each_array(v) for v in value), **updates)

    def set_value(self, value: Any, **options: Any) -> None:
        """Another QTensor in its place."""
        super().set_value(self._for_each_array(value), **options)

    def _for_each_array(self, value: Any) -> Any:
        """A spec or an abstract array that Flax means for the kernel, as one for each array of the QTensor.

        `nnx.get_partition_spec`, `nnx.get_named_sharding`, `nnx.eval_shape` and `nnx.as_abstract` give such values.
        """
        if isinstance(value, PartitionSpec):
            return specs(self.get_value(), value)
        if not isinstance(value, jax.ShapeDtypeStruct):
            return value
        placed = shardings(self.get_value(), value.sharding.mesh, value.sharding.spec)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), self.get_value(), placed)

    def __getitem__(self, key: Any) -> Any:
        raise QTensorError(
            f"a QParam holds a QTensor, which cannot be indexed with {key!r}: get_value() returns it, "
            "get_value().dequantize() the float kernel"
        )


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """What the axes of a Flax layer's kernel do; those before the last `rank` are stacked.

    Attributes:
      contracted: with x, counted from the end, in the order in which K runs.
      rank: how many axes one layer has, contracted ones and outputs.
    """

    contracted: tuple[int, ...]
    rank: int

    def use(self, ndim: int) -> KernelUse:
        """The same for a kernel of `ndim` axes."""
        return KernelUse(self.contracted, tuple(range(ndim - self.rank)))


def quantize_param(
    param: nnx.Variable,
    axes: KernelAxes,
    scheme: Scheme | str,
    *,
    where: str = "kernel",
    partial_groups: bool = False,
    k_pieces: int = 1,
    scale: jax.Array | None = None,
) -> QParam:
    """A float Param as a QParam, with its metadata, on the devices where it lies.

    Args:
      param: holds the kernel; where that is cut over a mesh, so are the QTensor's arrays, and K is padded by shards.
      axes: of its kernel.
      scheme: a `qjax.Scheme` or its string.
      where, partial_groups, k_pieces, scale: as `qjax.quantize_array`.

    Raises:
      QuantizeError: as `qjax.quantize_array`; for a Param with hooks, which expect an array.
      ShardingError: where a shard cuts a scale group, naming mesh axis, shard and group.
    """
    metadata = metadata_of(param, where)
    kernel = param.get_value()
    use = axes.use(kernel.ndim)
    options: dict[str, Any] = {"where": where, "partial_groups": partial_groups, "scale": scale}
    home = _traced_sharding(param)
    if home is None:
        return QParam(quantize_kernel(kernel, scheme, use, **options, k_pieces=k_pieces), **metadata)
    mesh: Any = home.mesh
    if k_pieces == 1:
        k_pieces = math.prod(mesh.shape[name] for name in entries(home.spec, kernel.ndim)[axes.contracted[0]])
    whole = _put(jnp.asarray(kernel), NamedSharding(mesh, PartitionSpec()))
    w = quantize_kernel(whole, scheme, use, **options, k_pieces=k_pieces)
    return QParam(jax.tree.map(_put, w, shardings(w, mesh, home.spec, where=where)), **metadata)


def metadata_of(param: nnx.Variable, where: str) -> dict[str, Any]:
    """What goes from a float Param to the QParam in its place.

    Raises:
      QuantizeError: for a Param with hooks, which expect an array, and for one that holds none.
    """
    metadata = {k: v for k, v in param.get_metadata().items() if k not in nnx.Variable.required_metadata}
    # `nnx.with_partitioning` writes None where it is given no mesh, which `nnx.as_abstract` would take for one.
    if metadata.get("mesh", ...) is None:
        del metadata["mesh"]
    hooks = [hook for hook in _HOOKS if metadata.get(hook)]
    if hooks:
        raise QuantizeError(f"{where}: the Param has hooks {', '.join(hooks)}, which expect an array and not a QTensor")
    kernel = param.get_value()
    if not isinstance(kernel, jax.Array | np.ndarray):
        raise QuantizeError(f"{where}: the Param holds a {type(kernel).__name__}, which is no array to quantize")
    return metadata


def _traced_sharding(param: nnx.Variable) -> NamedSharding | None:
    """How a traced kernel is cut over a mesh: by its type, or by its metadata where axes are Auto.

    None outside of a trace, where the array tells `quantize_kernel`, and where nothing is cut.
    """
    kernel = param.get_value()
    if not isinstance(kernel, jax.core.Tracer):
        return None
    mesh, spec = jax.typeof(kernel).sharding.mesh, jax.typeof(kernel).sharding.spec
    if not any(spec) and param.get_metadata("out_sharding", None) and param.get_metadata("eager_sharding"):
        mesh = param.get_metadata("mesh", None) or jax.sharding.get_abstract_mesh()
        spec = nnx.spmd.get_var_pspec(param)
    return NamedSharding(mesh, spec) if any(spec) else None


def _put(a: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A traced array where `sharding` says."""
    is_explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(a, sharding) if is_explicit else jax.lax.with_sharding_constraint(a, sharding)
