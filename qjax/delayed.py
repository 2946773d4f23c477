"""Delayed scaling of x: the scale of a call is made of the largest magnitudes that the calls before it met.

    amax_t = max |x_t|
    m_t = max(amax_t, ..., amax_{t-H+1})        or amax_t alone, "most_recent"
    s_{t+1} = 2^margin * m_t / fmax             s_t where m_t is 0 or not finite; s_1 is 1, or the QTensor's act_scale

So x is read once: its scale is there when it comes. What grew beyond the range saturates, and is right one call later.
Source: NVIDIA, Transformer Engine, the recipe `DelayedScaling`, whose scale divides where this one multiplies.

The scheme says how (`qjax.schemes.Delayed`); layers keep an `AmaxHistory`, `qjax.linen` in a collection, `qjax.nnx` in
Variables, and give the product its static scale.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from qjax.errors import QTensorError
from qjax.formats import FORMATS
from qjax.partition import mesh_of
from qjax.qtensor import QTensor
from qjax.schemes import Delayed, parse_scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AmaxHistory:
    """What a layer remembers of x.

    Attributes:
      amax: of the last H calls, the newest first, 0 for those that were not: float32 `[*stack, H]`.
      scale: of the next call, float32 `[*stack]`.
    """

    amax: jax.Array
    scale: jax.Array


def delayed_of(w: QTensor) -> Delayed | None:
    """How the scale of what meets a weight is delayed; None where it is not."""
    return None if w.scheme.activation is None else w.scheme.activation.delayed


def start(w: QTensor) -> AmaxHistory:
    """Before the first call."""
    delayed = delayed_of(w)
    assert delayed is not None, w.scheme
    scale = jnp.ones(w.stack_shape, jnp.float32) if w.act_scale is None else w.act_scale
    return AmaxHistory(jnp.zeros((*w.stack_shape, delayed.history), jnp.float32), scale)


def observe(seen: AmaxHistory, x: jax.Array, w: QTensor) -> AmaxHistory:
    """One call more.

    Args:
      seen: the calls before.
      x: what meets the weight, in any order of axes; inside of a shard_map, over all devices that it varies on. No
        gradient flows here.
      w: the weight; where kernels are stacked in it, all have the same x.

    Raises:
      QTensorError: a weight with an `input_scale`, by which the product changes x.
    """
    delayed, activation = delayed_of(w), w.scheme.activation
    assert delayed is not None and activation is not None, w.scheme
    if w.input_scale is not None:
        raise QTensorError(f"{w!r} has an input_scale, and its scheme a delayed scale of x: one of both can be had")
    now = jnp.max(jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.float32), initial=0.0)
    if mesh_of([x])[1] == AxisType.Manual:
        now = jax.lax.pmax(now, tuple(sorted(jax.typeof(x).manual_axis_type.varying)))
    now = jnp.broadcast_to(now, (*seen.scale.shape, 1))
    amax = jnp.concatenate([now, seen.amax[..., :-1]], axis=-1)
    most = jnp.max(amax, axis=-1) if delayed.amax == "max" else amax[..., 0]
    scale = most * (2.0**delayed.margin / FORMATS[activation.format].maximum)
    usable = (most > 0) & jnp.isfinite(scale)
    return AmaxHistory(amax, jnp.where(usable, jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), seen.scale))


def fixed(w: QTensor, act_scale: jax.Array) -> QTensor:
    """The weight under the static scheme, with a scale that no longer moves."""
    name, _, options = w.scheme.spec.partition(":")
    mine = {"mode", *(field.name for field in dataclasses.fields(Delayed))}
    kept = [option for option in options.split(",") if option.partition("=")[0] not in mine]
    twin = parse_scheme(f"{name}:{','.join([*kept, 'mode=static'])}")
    scheme = dataclasses.replace(w.scheme, spec=twin.spec, activation=twin.activation)
    return dataclasses.replace(w, scheme=scheme, act_scale=act_scale)
