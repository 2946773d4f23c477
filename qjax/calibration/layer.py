"""One layer: a weight and the statistics of its input -> a QTensor, by a recipe."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qjax.calibration.grid import Grid
from qjax.calibration.hqq import hqq
from qjax.calibration.moments import Statistics
from qjax.calibration.recipe import Recipe
from qjax.calibration.scaling import awq, nearest, pooled, shared, smoothquant
from qjax.calibration.subject import Target
from qjax.calibration.sweep import descend, factor, gptq
from qjax.errors import CalibrationError
from qjax.flax_kernel import KernelLayout, home_of, shards_of_k
from qjax.qtensor import QTensor
from qjax.quantize import check_kernel, from_codes, quantize_array, scale_dtype_of
from qjax.schemes import Scheme

type Coded = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]

BLOCK = 128  # columns that are updated one by one where groups don't say


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight to be quantized.

    Attributes:
      where: its path.
      weight: float `[K, N]`.
      scheme: what becomes of it.
      partial_groups, k_pieces: as of `qjax.quantize_array`.
    """

    where: str
    weight: jax.Array
    scheme: Scheme
    partial_groups: bool = False
    k_pieces: int = 1

    @property
    def width(self) -> int:
        """Columns that are rounded together: a group, or a block of a channel."""
        return self.scheme.block[1] or BLOCK

    @property
    def pad(self) -> int:
        """Columns that fill the last of these up."""
        return -self.weight.shape[0] % self.width

    @property
    def size(self) -> int:
        """Columns that share a scale, padding counted."""
        return self.scheme.block[1] or self.weight.shape[0] + self.pad

    def rows(self) -> jax.Array:
        """The weight as float32 `[N, K]`."""
        return self.weight.astype(jnp.float32).T


def layer_of(
    target: Target, layout: KernelLayout, kernel: jax.Array, index: tuple[int, ...], *, partial_groups: bool
) -> Layer:
    """One of the matrices in a kernel, with the scheme of the target's rule.

    Args:
      target: what is to become of the kernel.
      layout: of the kernel.
      kernel: as the model has it.
      index: of the matrix among those that are stacked.
      partial_groups: also where the rule does not allow them.
    """
    home, pieces = home_of(kernel), target.rule.k_pieces
    if home is not None and pieces == 1:
        pieces = shards_of_k(*home, kernel.shape, target.use)
    where = f"{target.path}{list(index)}" if index else target.path
    assert target.rule.scheme is not None, target.path
    partial = partial_groups or target.rule.partial_groups
    return Layer(where, layout.matrix(kernel, index), target.rule.scheme, partial, pieces)


def grid_of(layer: Layer, recipe: Recipe) -> Grid:
    """The integers of a layer's scheme.

    Raises:
      CalibrationError: a scheme that is not of integers with a scale a row or a group of one.
      QuantizeError: a weight that the scheme does not fit.
    """
    scheme = layer.scheme
    if scheme.format.kind != "int" or scheme.block[0] != 1:
        raise CalibrationError(
            f"{layer.where}: recipe {recipe} makes integers with scales of channels or groups; got scheme {scheme}"
        )
    if recipe.rounding == "hqq" and scheme.symmetric:
        raise CalibrationError(f"{layer.where}: hqq moves zero points, which {scheme} lacks; add symmetric=false")
    check_kernel(layer.where, layer.weight, scheme, layer.partial_groups, layer.k_pieces)
    return Grid(
        scheme.bits, scheme.symmetric, scale_dtype_of(layer.weight, scheme), recipe.shrinks, recipe.rounding == "hqq"
    )


@functools.partial(jax.jit, static_argnames="pad")
def _damped(hessian: jax.Array, order: jax.Array, share: jax.Array, pad: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean = jnp.mean(jnp.diagonal(hessian))
    mean = jnp.where(mean > 0, mean, 1.0)
    wide = jnp.pad(hessian[order][:, order], (0, pad)) + (share * mean) * jnp.eye(hessian.shape[0] + pad)
    # Columns that only fill the last block meet nothing, and are as any other to the factorization.
    wide += jnp.diag(jnp.where(jnp.arange(wide.shape[0]) < hessian.shape[0], 0.0, mean))
    upper = factor(wide)
    return wide, upper, jnp.all(jnp.isfinite(upper))


def damped_factor(
    hessian: jax.Array, order: jax.Array, damping: float, pad: int, where: str
) -> tuple[jax.Array, jax.Array]:
    """H in another order of columns, its diagonal raised by a share of its mean, and its `factor`.

    The share is ten times as large as often as it takes to make H positive definite, which is reported.

    Args:
      hessian: float32 `[K, K]`.
      order: int `[K]`.
      damping: the share.
      pad: columns of no weight to add.
      where: the layer that the report names.

    Returns:
      Two float32 arrays `[K + pad, K + pad]`.
    """
    share = damping
    while True:
        wide, upper, fine = _damped(hessian, order, jnp.float32(share), pad)
        if fine:
            if share != damping:
                logging.warning("%s: its Hessian is singular; damping raised from %g to %g", where, damping, share)
            return wide, upper
        share = max(10 * share, 1e-4)


@jax.jit
def falling(hessian: jax.Array) -> jax.Array:
    """Columns by falling diagonal, int32 `[K]`."""
    return jnp.argsort(-jnp.diagonal(hessian), stable=True).astype(jnp.int32)


@jax.jit
def wanted(w: jax.Array, statistics: Statistics, share: jax.Array) -> jax.Array:
    """The weights whose outputs on the input at hand are nearest to the float model's on its own; see `GPTQ`.

    `argmin_V |X V' - Y W'|^2 + l |V - W|^2 = W (Y'X + l) (X'X + l)^-1`.

    Args:
      w: float32 `[N, K]`.
      statistics: with the float model's inputs.
      share: l, as a share of the mean of H's diagonal.
    """
    assert statistics.cross is not None, "asked for by the recipe"
    hessian, cross = statistics.hessian(), statistics.cross / statistics.tokens
    ridge = share * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(w.shape[1])
    right = jnp.matmul(cross + ridge, w.T, precision="highest")
    return jax.scipy.linalg.solve(hessian + ridge, right, assume_a="pos").T


@functools.partial(jax.jit, static_argnames=("passes", "grid", "size", "width", "own"))
def _by_columns(
    w: jax.Array,
    order: jax.Array,
    hessian: jax.Array,
    upper: jax.Array,
    *,
    grid: Grid,
    size: int,
    width: int,
    own: bool,
    passes: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes `[N, K + pad]` in storage order, and scales and zero points `[N, G]` of groups of `size`.

    `w` is in the order of x, `hessian` and `upper` in that of the columns as they are rounded. Where groups are `own`,
    they are of columns in that order, and so is storage.
    """
    (n, k), total = w.shape, hessian.shape[0]
    forth = jnp.concatenate([order, jnp.arange(k, total)])
    back = jnp.argsort(forth)
    natural = jnp.pad(w, ((0, 0), (0, total - k)))
    rounded = natural[:, forth]
    scale = zero = jnp.zeros_like(rounded)
    if not own:
        cost = (1 / jnp.diagonal(upper) ** 2)[back].reshape(-1, size)
        fitted = grid.fit(natural.reshape(n, -1, size), cost)
        scale, zero = (a[..., 0][:, forth // size] for a in fitted)
    codes, scale, zero = gptq(rounded, upper, scale, zero, grid=grid, width=width, own=own)
    if not own:  # groups as they lie
        codes, scale, zero = codes[:, back], scale[:, back], zero[:, back]
        hessian, rounded = hessian[back][:, back], natural
    scale, zero = scale[:, ::size], zero[:, ::size]
    if passes:
        return descend(rounded, codes, scale, zero, hessian, grid=grid, width=size, passes=passes)
    return codes, scale, zero


def _gptq(layer: Layer, grid: Grid, statistics: Statistics, recipe: Recipe) -> Coded:
    """Codes, scales, zero points, and the order of columns or None."""
    hessian = statistics.hessian()
    w = layer.rows()
    if recipe.outputs == "float":
        w = wanted(w, statistics, jnp.float32(recipe.damping))
    order = jnp.arange(w.shape[1]) if recipe.order == "natural" else falling(hessian)
    own = recipe.order != "static" and layer.scheme.block[1] is not None
    wide, upper = damped_factor(hessian, order, recipe.damping, layer.pad, layer.where)
    found = _by_columns(
        w, order, wide, upper, grid=grid, size=layer.size, width=layer.width, own=own, passes=recipe.passes
    )
    return (*found, order if recipe.order == "act" and own else None)


def _at_once(layer: Layer, grid: Grid, statistics: Statistics | None, recipe: Recipe) -> Coded:
    """The same of recipes that round all columns alike."""
    w = jnp.pad(layer.rows(), ((0, 0), (0, layer.pad)))
    if recipe.rounding == "hqq":
        return (*hqq(w, grid, layer.size), None)
    cost = jnp.ones(w.shape[1])
    if statistics is not None:
        cost = jnp.pad(jnp.diagonal(statistics.hessian()), (0, layer.pad))
    return (*nearest(w, cost, grid, layer.size), None)


@functools.partial(jax.jit, static_argnames=("scheme", "grid", "dtype", "pieces"))
def _assemble(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    order: jax.Array | None,
    scheme: Scheme,
    grid: Grid,
    dtype: np.dtype,
    pieces: int,
) -> QTensor:
    """The QTensor of codes `[N, K]`, scales and zero points `[N, G]` that are held in float32."""
    shift = 128 if grid.bits == 8 else 0
    return from_codes(
        (codes - shift).astype(scheme.format.dtype),
        scale.astype(grid.dtype),
        scheme,
        dtype=dtype,
        pieces=pieces,
        zero_point=None if grid.symmetric else (zero - shift).astype(grid.dtype if grid.real_zero else jnp.int8),
        input_perm=order,
    )


def quantize_layer(layer: Layer, statistics: Statistics | None, recipe: Recipe) -> QTensor:
    """Quantizes a weight.

    Args:
      layer: the weight and its scheme.
      statistics: of what enters it; not looked at by recipes that need none.
      recipe: how; its scaling has been done.

    Raises:
      CalibrationError: a scheme that the recipe cannot make.
      QuantizeError: as `qjax.quantize_array`.
    """
    if not recipe.needs_data:
        statistics = None
    if recipe.rounding == "nearest" and not recipe.shrinks:
        return quantize_array(
            layer.weight,
            layer.scheme,
            where=layer.where,
            partial_groups=layer.partial_groups,
            k_pieces=layer.k_pieces,
        )
    grid = grid_of(layer, recipe)
    if recipe.rounding == "gptq":
        assert statistics is not None, recipe
        codes, scale, zero, order = _gptq(layer, grid, statistics, recipe)
    else:
        codes, scale, zero, order = _at_once(layer, grid, statistics, recipe)
    codes = codes[:, : layer.weight.shape[0]]
    return _assemble(codes, scale, zero, order, layer.scheme, grid, np.dtype(layer.weight.dtype), layer.k_pieces)


def factors_of(
    layers: list[Layer], statistics: Statistics, recipe: Recipe, groups: np.ndarray | None = None
) -> jax.Array:
    """What the columns of layers that share an input are multiplied by: float32 `[K]`.

    Args:
      layers: these.
      statistics: of their input.
      recipe: how.
      groups: int `[K]`; columns of one number get one factor. None where each may have its own.

    Raises:
      CalibrationError: a scheme that the recipe cannot make.
    """
    assert recipe.scaling is not None, recipe
    weights = [layer.rows() for layer in layers]
    if groups is not None and len(np.unique(groups)) == len(groups):
        groups = None
    if recipe.scaling.search == "smoothquant":
        factors = smoothquant(weights, statistics, recipe.scaling.strength)
        return factors if groups is None else shared(factors, groups)
    grids = tuple(grid_of(layer, recipe) for layer in layers)
    statistics = statistics if groups is None else pooled(statistics, groups)
    return awq(weights, statistics, grids, tuple(layer.size for layer in layers))
