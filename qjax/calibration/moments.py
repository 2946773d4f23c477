"""What calibration keeps of a layer's input: sums over tokens, in float32, on the devices where the input lies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qjax.calibration.act_scale import histogram
from qjax.calibration.tap import rows
from qjax.errors import CalibrationError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over tokens t of x `[*stack, T, K]`, what the layer meets behind quantized layers.

    Attributes:
      gram: `sum_t x_t x_t'`, float32 `[*stack, K, K]`.
      cross: `sum_t x_t y_t'` with y what the layer meets in the float model; None where nobody asked.
      magnitude: `sum_t |x_t|`, float32 `[*stack, K]`.
      peak: `max_t |x_t|`, float32 `[*stack, K]`.
      counts: how many |x| lie in each bin, as of `qjax.calibration.act_scale.histogram`; None where nobody asked.
      tokens: T, float32.
      bad: the first batch that has a NaN or an infinity, int32; -1 for none.
    """

    gram: jax.Array
    cross: jax.Array | None
    magnitude: jax.Array
    peak: jax.Array
    counts: jax.Array | None
    tokens: jax.Array
    bad: jax.Array

    def hessian(self) -> jax.Array:
        """`X'X / T`."""
        return self.gram / self.tokens

    def check(self, where: str) -> None:
        """Raises for a layer that NaN or infinity enters.

        Raises:
          CalibrationError: naming `where` and the batch.
        """
        if (bad := int(self.bad)) >= 0:
            raise CalibrationError(f"{where}: batch {bad} brings NaN or inf to this layer")

    def at(self, index: tuple[int, ...]) -> "Statistics":
        """Of one of the stacked layers."""
        return dataclasses.replace(
            self,
            gram=self.gram[index],
            cross=None if self.cross is None else self.cross[index],
            magnitude=self.magnitude[index],
            peak=self.peak[index],
            counts=None if self.counts is None else self.counts[index],
        )

    @jax.jit
    def divided(self, factors: jax.Array) -> "Statistics":
        """Of `x / factors`, float32 `[K]`; the float model's y divided too. Magnitudes are not counted anew."""
        outer = factors[:, None] * factors
        return dataclasses.replace(
            self,
            gram=self.gram / outer,
            cross=None if self.cross is None else self.cross / outer,
            magnitude=self.magnitude / factors,
            peak=self.peak / factors,
            counts=None,
        )


@jax.jit
def add(one: Statistics, two: Statistics) -> Statistics:
    """Both together."""
    total = jax.tree.map(jnp.add, one, two)
    bad = jnp.where(one.bad >= 0, one.bad, two.bad)
    return dataclasses.replace(total, peak=jnp.maximum(one.peak, two.peak), bad=bad)


@functools.partial(jax.jit, static_argnames=("contracted", "stacked", "counted"))
def measure(
    x: jax.Array,
    y: jax.Array | None,
    batch: jax.Array,
    contracted: tuple[int, ...],
    stacked: tuple[int, ...],
    counted: bool = False,
) -> Statistics:
    """Those of one batch.

    Args:
      x: as the tap saw it; `contracted` and `stacked` as of `qjax.calibration.tap.rows`.
      y: the same in the float model, or None.
      batch: its number.
      counted: whether magnitudes are counted.
    """
    x = rows(x, contracted, stacked).astype(jnp.float32)
    product = functools.partial(jnp.einsum, "...ti,...tj->...ij", precision=jax.lax.Precision.HIGHEST)
    size = jnp.abs(x)
    return Statistics(
        gram=product(x, x),
        cross=None if y is None else product(x, rows(y, contracted, stacked).astype(jnp.float32)),
        magnitude=jnp.sum(size, axis=-2),
        peak=jnp.max(size, axis=-2),
        counts=histogram(x) if counted else None,
        tokens=jnp.float32(x.shape[-2]),
        bad=jnp.where(jnp.all(jnp.isfinite(x)), -1, batch).astype(jnp.int32),
    )
