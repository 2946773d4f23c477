"""Where a QTensor's arrays lie on a mesh, from the PartitionSpec of the kernel it stands for."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.contract import kernel_axes
from qjax.errors import ShardingError
from qjax.partition import all_specs, check_cut, entries
from qjax.qtensor import QTensor, is_qtensor


def specs(w: QTensor, spec: PartitionSpec, mesh: Mesh | None = None, *, where: str = "QTensor") -> QTensor:
    """A QTensor of PartitionSpecs from the spec of its Flax kernel.

    `P(k, n)` on a kernel is `P(n, k, None)` on packed words, `P(n, k)` on scales and zero points, with None on axes of
    size 1.

    Args:
      w: arrays or ShapeDtypeStructs.
      spec: over the axes of `w.shape`; where K or N are several axes, only the first of them may be cut.
      mesh: where given, cuts through groups and blocks are found here.
      where: the path that errors name.

    Raises:
      ShardingError: a cut through a scale group, a packed block or a padded piece, naming mesh axis, shard and group; a
        spec longer than the kernel; a later axis of several that is cut.
    """
    if len(spec) > w.ndim:
        raise ShardingError(f"{where}: spec {spec} has {len(spec)} entries for a kernel of shape {w.shape}")
    given = entries(spec, w.ndim)
    stack, inputs, outputs = kernel_axes(w)
    for axis in (*inputs[1:], *outputs[1:]):
        if given[axis]:
            first = inputs[0] if axis in inputs else outputs[0]
            raise ShardingError(f"{where}: axis {axis} of kernel {w.shape} is cut by {given[axis]}; cut axis {first}")
    n, k = given[outputs[0]], given[inputs[0]]
    if mesh is not None:
        sizes = dict(mesh.shape)
        unknown = [a for names in given for a in names if a not in sizes]
        if unknown:
            raise ShardingError(f"{where}: spec {spec} names {unknown}; the mesh has {tuple(sizes)}")
        parts = {"n": _devices(n, sizes), "k": _devices(k, sizes)}
        check_cut(w, parts, {"n": n, "k": k}, where)
    return all_specs(w, [given[a] for a in stack], n, k)


def _devices(names: tuple[str, ...], sizes: dict[str, int]) -> int:
    count = 1
    for name in names:
        count *= sizes[name]
    return count


def shardings(w: QTensor, mesh: Mesh, spec: PartitionSpec, *, where: str = "QTensor") -> QTensor:
    """A QTensor of NamedShardings: `specs` on a mesh."""
    placed = specs(w, spec, mesh, where=where)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), placed, is_leaf=lambda s: isinstance(s, PartitionSpec))


def shard(w: QTensor, mesh: Mesh, spec: PartitionSpec, *, where: str = "QTensor") -> QTensor:
    """Puts a QTensor on a mesh as its kernel's spec says; arguments and errors as `specs`."""
    return jax.device_put(w, shardings(w, mesh, spec, where=where))


def shard_params(params: Any, mesh: Mesh, kernel_specs: Any) -> Any:
    """Puts a params tree with QTensors on a mesh.

    Args:
      params: arrays and QTensors.
      mesh: of Auto or Explicit axes.
      kernel_specs: a tree like `params`, one PartitionSpec (None is replicated) where params has an array or a QTensor.

    Raises:
      ShardingError: as `specs`, naming the path.
    """

    def put(path: Any, leaf: Any, spec: PartitionSpec | None) -> Any:
        spec = PartitionSpec() if spec is None else spec
        if is_qtensor(leaf):
            return shard(leaf, mesh, spec, where=jax.tree_util.keystr(path, simple=True, separator="/"))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, params, kernel_specs, is_leaf=lambda a: is_qtensor(a) or a is None)
