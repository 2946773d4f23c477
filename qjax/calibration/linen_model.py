"""A linen model and its params as a `Subject`: an interceptor taps what enters Flax's own layers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.calibration.subject import Subject, Target
from qjax.calibration.tap import einsum_axes_of_x, tap
from qjax.convert import plan_params
from qjax.errors import CalibrationError
from qjax.linen.boxes import unboxed
from qjax.linen.intercept import intercept, method_of
from qjax.linen.products import einsum_spec, general_axes
from qjax.qtensor import QTensor, is_qtensor
from qjax.rules import KINDS


def _last(layer: Any, x: jax.Array, *_: Any, **__: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (-1,), ()


def _general(layer: Any, x: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axis, batch, _ = general_axes(layer, x.ndim)
    return axis, batch


def _einsum(layer: Any, x: jax.Array, einsum_str: str | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return einsum_axes_of_x(einsum_spec(layer, einsum_str), x.ndim)


# Flax's own methods: the param, and the axes of the first argument as `tap` takes them.
TAPPED: dict[Any, tuple[str, Callable[..., tuple[tuple[int, ...], tuple[int, ...]]]]] = {
    inspect.unwrap(nn.Dense.__call__): ("kernel", _last),
    inspect.unwrap(nn.DenseGeneral.__call__): ("kernel", _general),
    inspect.unwrap(nn.Einsum.__call__): ("kernel", _einsum),
    inspect.unwrap(nn.Embed.attend): ("embedding", _last),
}


def _step_in(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    found = TAPPED.get(method_of(context))
    if found is None or not args:
        return next_fun(*args, **kwargs)
    name, axes = found
    layer: Any = context.module
    kernel = unboxed(layer.scope.get_variable("params", name))
    if is_qtensor(kernel):
        return next_fun(*args, **kwargs)
    x, rest = jnp.asarray(args[0]), args[1:]
    return next_fun(tap(x, kernel, *axes(layer, x, *rest, **kwargs)), *rest, **kwargs)


def subject(
    model: nn.Module, params: Any, scheme_or_rules: Any, batch: tuple[Any, ...] | None, options: Mapping[str, Any]
) -> Subject:
    """A model of which a params tree with QTensors is made.

    Args:
      model: any linen module.
      params: as of `qjax.quantize`.
      scheme_or_rules: as of `qjax.quantize`.
      batch: arguments of the model, for their shapes; without them, kernels' axes are known as without a model.
      options: keyword arguments of `model.apply`.

    Raises:
      CalibrationError: a layer that the batch does not reach.
      RuleError, QuantizeError, NotImplementedError: as `qjax.quantize`.
    """
    plan = plan_params(params, scheme_or_rules, None if batch is None else model, batch, options)
    if plan.idle:
        raise CalibrationError(f"{plan.idle[0]}: no batch reaches this layer; leave it out by a rule")
    variables = params if isinstance(params.get("params"), Mapping) else {"params": params}
    leaves, tree = jax.tree.flatten(variables)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    tasks = {place[id(plan.kernel(task))]: task for task in plan.tasks}
    targets = {
        leaf: Target(task.path, task.use, task.rule, KINDS[task.path.rpartition("/")[2]] == "embedding")
        for leaf, task in tasks.items()
    }

    def call(leaves: list[Any], batch: Any) -> Any:
        with intercept(), nn.intercept_methods(_step_in):
            return model.apply(jax.tree.unflatten(tree, leaves), *batch, **options)

    def install(kernels: Mapping[int, QTensor], norms: Mapping[int, jax.Array]) -> Any:
        plan.leaves = jax.tree.map(lambda a: norms.get(place[id(a)], a), plan.leaves)
        for leaf, w in kernels.items():
            plan.put(tasks[leaf], w)
        return plan.result()

    return Subject([jnp.asarray(leaf) for leaf in leaves], call, targets, install)
