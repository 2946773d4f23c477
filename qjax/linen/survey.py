"""What each layer of a linen model does with the axes of its kernel, learned by tracing the model on shapes alone.

Every kernel goes in with its axes numbered, in a box of the kind that Flax tells when `nn.scan` or `nn.vmap` takes an
axis away. So a layer deep inside sees which axes are left to it, and the missing ones are those of stacked layers:
shapes could not tell, `(8, 64, 64)` being stacked matrices or one with heads.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from qjax.errors import QuantizeError
from qjax.flax_kernel import KernelUse
from qjax.linen.boxes import is_box, unboxed
from qjax.linen.intercept import intercept, method_of
from qjax.linen.products import einsum_axes, einsum_spec, general_axes, general_use
from qjax.qtensor import is_qtensor
from qjax.rules import KINDS


class Numbered(struct.PyTreeNode, meta.AxisMetadata):
    """A param, the numbers of the axes it has left of `rank`, and its path."""

    value: Any
    axes: tuple[int, ...] = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    path: str = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The param."""
        return self.value

    def replace_boxed(self, val: Any) -> "Numbered":
        """The box with another param."""
        return self.replace(value=val)

    def remove_axis(self, index: int, params: Any) -> "Numbered":
        """Without the axis that a transformation took."""
        axes = list(self.axes)
        axes.pop(index)
        return self.replace(axes=tuple(axes))

    def add_axis(self, index: int, params: Any) -> "Numbered":
        """With an axis that a transformation gave back; its number is not known."""
        axes = list(self.axes)
        axes.insert(index, -1)
        return self.replace(axes=tuple(axes))


def _dense(layer: Any, *_: Any, **__: Any) -> KernelUse:
    return KernelUse((0,))


def _dense_general(layer: Any, inputs: Any) -> KernelUse:
    axis, batch, _ = general_axes(layer, jnp.ndim(inputs))
    return general_use(len(axis), len(batch))


def _einsum(layer: Any, inputs: Any, einsum_str: str | None = None) -> KernelUse:
    return einsum_axes(einsum_spec(layer, einsum_str))


def _embed(layer: Any, *_: Any, **__: Any) -> KernelUse:
    return KernelUse((1,))


USES: dict[Any, tuple[str, Callable[..., KernelUse] | None]] = {
    inspect.unwrap(nn.Dense.__call__): ("kernel", _dense),
    inspect.unwrap(nn.DenseGeneral.__call__): ("kernel", _dense_general),
    inspect.unwrap(nn.Einsum.__call__): ("kernel", _einsum),
    inspect.unwrap(nn.Embed.__call__): ("embedding", _embed),
    inspect.unwrap(nn.Embed.attend): ("embedding", _embed),
}


def _number(key: Any, leaf: Any) -> Any:
    """A kernel as a shape in a numbered box; any other param as it is."""
    path = jax.tree_util.keystr(key, simple=True, separator="/")
    if is_qtensor(leaf) or path.rpartition("/")[2] not in KINDS:
        return leaf
    array = unboxed(leaf)
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return Numbered(shape, tuple(range(len(array.shape))), len(array.shape), path)


def _seen(box: Numbered, local: KernelUse) -> KernelUse:
    """A layer's use of the axes it has, in the numbers of the whole param."""
    taken = tuple(a for a in range(box.rank) if a not in box.axes)
    return KernelUse(tuple(box.axes[a] for a in local.contracted), taken + tuple(box.axes[a] for a in local.stacked))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def survey(
    model: nn.Module, variables: Mapping[str, Any], inputs: Any, options: Mapping[str, Any]
) -> dict[str, set[KernelUse]]:
    """Traces `model.apply(variables, *inputs, **options)` on shapes.

    Args:
      model: any linen module.
      variables: `{"params": ...}` and other collections, arrays or ShapeDtypeStructs.
      inputs: a tuple of arguments, or the only one. Leaves that are no arrays stay as they are.
      options: keyword arguments.

    Returns:
      For each kernel that a Dense, DenseGeneral, Einsum or Embed used, by the path of the param, how; for each whose
      module was never called, nothing.

    Raises:
      QuantizeError: for a model that is no linen module.
    """
    if not isinstance(model, nn.Module):
        raise QuantizeError(f"model is a {type(model).__name__}; a flax.linen module is wanted")
    found: dict[str, set[KernelUse]] = {}
    called: set[str] = set()

    def observe(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        name, use = USES.get(method_of(context), ("", None))
        layer = context.module
        if layer.scope is not None and context.method_name != "setup":
            boxes = {kind: layer.scope.get_variable("params", kind) for kind in KINDS}
            called.update(box.path for box in boxes.values() if isinstance(box, Numbered))
            box = boxes.get(name)
            if use is not None and isinstance(box, Numbered):
                found.setdefault(box.path, set()).add(_seen(box, use(layer, *args, **kwargs)))
        return next_fun(*args, **kwargs)

    numbered = jax.tree_util.tree_map_with_path(
        _number, variables["params"], is_leaf=lambda a: is_qtensor(a) or is_box(a)
    )
    arguments = (inputs if isinstance(inputs, tuple) else (inputs,), dict(options))
    leaves, tree = jax.tree.flatten(arguments)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if _is_array(leaf)}

    def call(variables: Any, arrays: dict[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return model.apply(variables, *args, **kwargs)

    with intercept(), nn.intercept_methods(observe):
        jax.eval_shape(call, {**variables, "params": numbered}, arrays)
    boxes = jax.tree.leaves(numbered, is_leaf=lambda a: isinstance(a, Numbered))
    paths = {box.path for box in boxes if isinstance(box, Numbered)}
    return found | {path: set() for path in paths - called - found.keys()}
