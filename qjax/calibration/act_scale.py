"""Static scales of x, from what was seen of it: the `act_scale` of schemes whose activations are `mode=static`.

Magnitudes are counted in bins of equal ratio, 16 an octave: batches can be added up before their range is known.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from qjax.errors import CalibrationError
from qjax.formats import FORMATS
from qjax.schemes import Activation

type ActScale = Literal["max", "mse"] | float

OCTAVE = 16  # bins
LOWEST = -32  # the first bin is of everything below 2**LOWEST
BINS = 64 * OCTAVE
SHORTEST = 64  # how many times shorter than the largest magnitude a range may be


def as_act_scale(given: object) -> ActScale:
    """One of "max", "mse" and percentiles, checked.

    Raises:
      CalibrationError: anything else.
    """
    if given == "max" or given == "mse":
        return given
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 100:
        raise CalibrationError(f"act_scale={given!r}; allowed: 'max', 'mse', or a percentile above 0 and up to 100")
    return float(given)


def histogram(x: jax.Array) -> jax.Array:
    """How many magnitudes of x `[*stack, T, K]` lie in each bin: uint32 `[*stack, BINS]`."""
    size = jnp.abs(x.astype(jnp.float32))
    place = OCTAVE * (jnp.log2(jnp.maximum(size, 2.0**LOWEST)) - LOWEST)
    index = jnp.clip(place.astype(jnp.int32), 0, BINS - 1).reshape(-1, x.shape[-2] * x.shape[-1])
    counts = jax.vmap(lambda i: jnp.zeros(BINS, jnp.uint32).at[i].add(1))(index)
    return counts.reshape(*x.shape[:-2], BINS)


def static_scale(peak: jax.Array, counts: jax.Array | None, activation: Activation, how: ActScale) -> jax.Array:
    """The scale of a whole tensor: a range over the format's largest value; 1 where x is always 0. Float32 `[]`.

    The range is the largest magnitude ("max"), one that so many percent of magnitudes do not exceed, or that of least
    squared error ("mse"): `argmin_r sum_x (x - Q_r(x))^2` with `Q_r` rounding to the format and clipping to r.

    Args:
      peak: of each channel, float32 `[K]`.
      counts: of `histogram`, `[BINS]`; not looked at for "max".
      activation: its format is asked for.
      how: one of these.
    """
    most = jnp.max(peak)
    reach = most
    if how != "max":
        assert counts is not None, how
        edges = 2.0 ** (jnp.arange(1, BINS + 1) / OCTAVE + LOWEST)
        if how == "mse":
            reach = _least_error(most, counts, activation)
        else:
            share = jnp.cumsum(counts.astype(jnp.float32)) / jnp.sum(counts.astype(jnp.float32))
            reach = jnp.minimum(edges[jnp.argmax(share >= (how / 100) * (1 - 1e-6))], most)
    return jnp.where(reach > 0, reach / FORMATS[activation.format].maximum, 1.0).astype(jnp.float32)


def _least_error(most: jax.Array, counts: jax.Array, activation: Activation) -> jax.Array:
    """The range from `most / SHORTEST` to `most` for which x in the middle of its bins is rounded best."""
    form = FORMATS[activation.format]
    x = 2.0 ** ((jnp.arange(BINS) + 0.5) / OCTAVE + LOWEST)
    weight = counts.astype(jnp.float32)

    def error(reach: jax.Array) -> jax.Array:
        scale = reach / form.maximum
        ratio = jnp.minimum(x, reach) / scale
        step: jax.Array | float = 1.0
        if form.kind != "int":  # e4m3: three bits behind the point, normal numbers from 2**-6
            step = 2.0 ** (jnp.maximum(jnp.floor(jnp.log2(ratio)), -6) - 3)
        rounded = jnp.where(ratio < step / 2, ratio**2, step**2 / 12) * scale**2
        return jnp.sum(weight * (rounded + jnp.maximum(x - reach, 0) ** 2))

    tried = most * 2.0 ** (-jnp.arange(OCTAVE * SHORTEST.bit_length() - OCTAVE + 1) / OCTAVE)
    return tried[jnp.argmin(jax.lax.map(error, tried))]
