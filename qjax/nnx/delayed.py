"""Delayed scales of x in nnx: each layer's `AmaxHistory` in Variables of its own."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from qjax.delayed import AmaxHistory, delayed_of, fixed, observe, start
from qjax.nnx.qparam import QParam
from qjax.qtensor import QTensor


class Amax(nnx.Variable[jax.Array]):
    """What a layer remembers of x; no `nnx.Param`, so that optimizers pass it by."""


class DelayedScale(nnx.Module):
    """The static scale of one layer's x, from its last calls.

    Attributes:
      amax_history, act_scale: the fields of `qjax.delayed.AmaxHistory`.
      use_running_average: True leaves them as they are; `module.eval()` sets it, `module.train()` takes it back.
    """

    def __init__(self, w: QTensor) -> None:
        seen = start(w)
        self.amax_history = Amax(seen.amax)
        self.act_scale = Amax(seen.scale)
        self.use_running_average = False

    def __call__(self, x: jax.Array, w: QTensor) -> QTensor:
        """The weight with its scale for x, which becomes part of the history."""
        seen = AmaxHistory(self.amax_history[...], self.act_scale[...])
        if not self.use_running_average:
            after = observe(seen, x, w)
            self.amax_history[...], self.act_scale[...] = after.amax, after.scale
        return dataclasses.replace(w, act_scale=seen.scale)


def delayed_scale(kernel: QParam) -> Any:
    """A layer's attribute: a `DelayedScale` where the scheme of its kernel asks for one, else None."""
    w = kernel.get_value()
    return nnx.data(None if delayed_of(w) is None else DelayedScale(w))


def scaled(delayed: DelayedScale | None, x: jax.Array, w: QTensor) -> QTensor:
    """The weight with its scale for x where that is delayed, else itself."""
    return w if delayed is None else delayed(x, w)


def fix_scales[M: nnx.Module](module: M) -> M:
    """Makes the delayed scales of a module static ones, in place: its schemes become `mode=static`.

    Returns:
      The module itself.
    """
    layers: list[Any] = [layer for _, layer in nnx.iter_modules(module, graph=True)]
    for layer in layers:
        delayed = getattr(layer, "delayed", None)
        if not isinstance(delayed, DelayedScale):
            continue
        name = "kernel" if hasattr(layer, "kernel") else "embedding"
        param = getattr(layer, name)
        # A Param of its own: layers that share a kernel have met different x.
        setattr(layer, name, param.replace(fixed(param.get_value(), delayed.act_scale[...])))
        layer.delayed = nnx.data(None)
    return module
