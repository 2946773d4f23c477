"""`intercept`: an unmodified linen model on quantized params, by stepping in where Flax's own layers read a kernel."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qjax.errors import QTensorError
from qjax.linen.param import stored_qtensor
from qjax.linen.products import attend, dense, dense_general, einsum_layer, einsum_spec, embed
from qjax.qtensor import QTensor, is_qtensor


def _bias(layer: Any) -> Any:
    return layer.param("bias", lambda *_: None) if layer.use_bias else None


def _dense(layer: Any, backend: str | None, w: QTensor, inputs: Any) -> Any:
    return dense(layer, inputs, w, _bias(layer), backend)


def _dense_general(layer: Any, backend: str | None, w: QTensor, inputs: Any) -> Any:
    return dense_general(layer, jnp.asarray(inputs), w, _bias(layer), backend)


def _einsum(layer: Any, backend: str | None, w: QTensor, inputs: Any, einsum_str: str | None = None) -> Any:
    return einsum_layer(layer, inputs, w, _bias(layer), einsum_spec(layer, einsum_str), backend)


def _setup_embed(layer: Any, backend: str | None, w: QTensor) -> None:
    layer.embedding = w


def _embed(layer: Any, backend: str | None, w: QTensor, inputs: Any) -> Any:
    return embed(layer, inputs, w)


def _attend(layer: Any, backend: str | None, w: QTensor, query: Any) -> Any:
    return attend(layer, query, w, backend)


def _param(name: str) -> Callable[[Any], QTensor | None]:
    return lambda layer: stored_qtensor(layer, name)


def _table(layer: Any) -> QTensor | None:
    """What `setup` has put there."""
    return layer.embedding if is_qtensor(layer.embedding) else None


# Flax's own methods: where each finds its kernel, and what to do if that is a QTensor. A subclass that overrides one
# and calls it by `super()` is served too.
METHODS: dict[Any, tuple[Callable[[Any], QTensor | None], Callable[..., Any]]] = {
    inspect.unwrap(nn.Dense.__call__): (_param("kernel"), _dense),
    inspect.unwrap(nn.DenseGeneral.__call__): (_param("kernel"), _dense_general),
    inspect.unwrap(nn.Einsum.__call__): (_param("kernel"), _einsum),
    inspect.unwrap(nn.Embed.setup): (_param("embedding"), _setup_embed),
    inspect.unwrap(nn.Embed.__call__): (_table, _embed),
    inspect.unwrap(nn.Embed.attend): (_table, _attend),
}


def method_of(context: nn.module.InterceptorContext) -> Any:
    """The function, as its class defines it, that Flax is about to call."""
    return getattr(context.orig_method, "func", None)


def _refuse_others_of_flax(layer: nn.Module) -> None:
    """Raises for a layer of Flax that would read a QTensor as an array, such as a cell that fuses its kernels."""
    served = isinstance(layer, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Embed)  # `nn.remat` and others wrap these
    if layer.scope is not None and type(layer).__module__.startswith("flax.") and not served:
        if is_qtensor(layer.scope.get_variable("params", "kernel")):
            raise QTensorError(
                f"{'/'.join(layer.path)}: {type(layer).__name__} cannot run on a quantized kernel; leave it alone with "
                f"the rule ({'/'.join(layer.path)!r}, None)"
            )


@contextlib.contextmanager
def intercept(backend: str | None = None) -> Iterator[None]:
    """A context in which Dense, DenseGeneral, Einsum and Embed of an unmodified linen model take QTensors for kernels.

    Layers whose kernel is an array run as they always do. Works inside jit, grad, `nn.remat`, `nn.scan` and `nn.vmap`.

    `jax.jit(model.apply)` keeps what its first trace met, as with any context: enter this one inside of the function
    that is jitted, or use `qjax.linen.apply`, which does.

        @jax.jit
        def predict(params, x):
            with qjax.linen.intercept():
                return model.apply({"params": params}, x)

    Args:
      backend: as `qjax.matmul`, for every layer.

    Raises:
      NotImplementedError: when a layer with a quantized kernel has a `dot_general` of its own.
      QTensorError: when another layer of Flax has a quantized kernel.
    """

    def step_in(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        found = METHODS.get(method_of(context))
        if found is None:
            _refuse_others_of_flax(layer)
            return next_fun(*args, **kwargs)
        kernel, call = found
        w = kernel(layer)
        return next_fun(*args, **kwargs) if w is None else call(layer, backend, w, *args, **kwargs)

    with nn.intercept_methods(step_in):
        yield


def apply(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.apply(variables, *args, **kwargs)` of an unmodified linen model on quantized params; see `intercept`."""
    with intercept():
        return model.apply(variables, *args, **kwargs)
