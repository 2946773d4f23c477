"""An nnx module as a `Subject`: the copy that a trace makes of it has layers that tap what enters them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.calibration.subject import Subject, Target
from qjax.calibration.tap import einsum_axes_of_x, tap
from qjax.nnx.convert import Task, plan
from qjax.nnx.qparam import QParam, metadata_of
from qjax.qtensor import QTensor


class _Linear(nnx.Linear):
    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(tap(inputs, self.kernel.get_value(), (-1,)), *args, **kwargs)


class _LoRALinear(nnx.LoRALinear):
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().__call__(tap(x, self.kernel.get_value(), (-1,)), *args, **kwargs)


class _LinearGeneral(nnx.LinearGeneral):
    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rank = inputs.ndim
        contracted = tuple(sorted(a % rank for a in self.axis))
        batch = tuple(sorted(a % rank for a in self.batch_axis))
        return super().__call__(tap(inputs, self.kernel.get_value(), contracted, batch), *args, **kwargs)


class _Einsum(nnx.Einsum):
    def __call__(self, inputs: Any, einsum_str: str | None = None, *args: Any, **kwargs: Any) -> Any:
        spec = einsum_str or self.einsum_str
        inputs = tap(inputs, self.kernel.get_value(), *einsum_axes_of_x(spec, inputs.ndim))
        return super().__call__(inputs, einsum_str, *args, **kwargs)


class _Embed(nnx.Embed):
    def attend(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return super().attend(tap(query, self.embedding.get_value(), (-1,)), *args, **kwargs)


TAPPED = {kind.__bases__[0]: kind for kind in (_Linear, _LoRALinear, _LinearGeneral, _Einsum, _Embed)}


def subject(model: nnx.Module, scheme_or_rules: Any) -> Subject:
    """A module whose layers are quantized in place once calibration is done.

    Raises:
      RuleError, QuantizeError, NotImplementedError: as `qjax.nnx.quantize`.
    """
    tasks = plan(model, scheme_or_rules)
    definition, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    metadata = {place[id(task.param.get_value())]: metadata_of(task.param, task.where) for task in tasks}
    targets = {place[id(task.param.get_value())]: _target(task) for task in tasks}
    leaf_of = {id(task): place[id(task.param.get_value())] for task in tasks}

    def call(leaves: list[Any], batch: Any) -> Any:
        copy = nnx.merge(definition, jax.tree.unflatten(tree, leaves))
        for _, layer in nnx.iter_modules(copy, graph=True):
            layer.__class__ = TAPPED.get(type(layer), type(layer))
        return copy(*batch)

    def install(kernels: Mapping[int, QTensor], norms: Mapping[int, jax.Array]) -> nnx.Module:
        for _, node in nnx.iter_graph(model):
            leaf = place.get(id(node.get_value())) if isinstance(node, nnx.Variable) else None
            if leaf is not None and leaf in norms:
                node.set_value(norms[leaf])
        params = {leaf: QParam(w, **metadata[leaf]) for leaf, w in kernels.items()}
        for task in tasks:
            task.swap_in(params[leaf_of[id(task)]])
        return model

    return Subject([jnp.asarray(leaf) for leaf in leaves], call, targets, install)


def _target(task: Task) -> Target:
    use = task.swap.axes(task.layer).use(task.param.get_value().ndim)
    return Target(task.where, use, task.rule, task.swap.kind == "embedding")
