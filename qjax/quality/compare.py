"""`compare`: two models on the same windows of a text, at once -> a `Comparison`."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.errors import QJaxError
from qjax.explain import layers
from qjax.models.perplexity import token_losses, windows_of
from qjax.progress import track
from qjax.qtensor import is_qtensor
from qjax.quality.comparison import Comparison, LayerComparison
from qjax.quality.outputs import Recorded, modules_of


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A layer in both models: its path, its scheme in each, and whether it is a table."""

    path: str
    base_scheme: str | None
    scheme: str | None
    is_table: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """Of one layer over the tokens of some batches: fields as of `LayerComparison`; `power` is a mean."""

    signal: Any
    noise: Any
    own_noise: Any
    peak: Any
    power: Any
    tokens: Any

    def __add__(self, other: "_Sums") -> "_Sums":
        total = jax.tree.map(np.add, self, other)
        if self.peak is None:
            return total
        power = (self.power * self.tokens + other.power * other.tokens) / total.tokens
        return dataclasses.replace(total, peak=np.maximum(self.peak, other.peak), power=power)


def compare(
    base: nnx.Module,
    model: nnx.Module,
    token_ids: Sequence[int] | np.ndarray | jax.Array,
    *,
    window: int = 512,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> Comparison:
    """Measures how far a model is from its base: each prediction of a text, and each quantized layer.

    Both run on the same batches in one jitted program, and what leaves a layer in one is compared with what leaves it
    in the other. Neither has to be float: two quantized models can be compared too.

    Args:
      base, model: nnx modules, int32 ids `[B, S]` -> logits `[B, S, V]`, as `qjax.load` gives them. Their layers have
        the same paths.
      token_ids: the whole text, `[T]`, cut into windows as by `qjax.models.perplexity`.
      window: tokens a window.
      max_windows: the first so many windows only.
      batch_size: windows at a time. Logits of both take `8 * batch_size * window * V` bytes, and outputs of compared
        layers are held until both models have them.
      progress: True, False, or None for a bar on a terminal when the work takes longer than two seconds.

    Raises:
      QJaxError: no whole window, token ids that a model does not have, models of different vocabularies, a layer that
        is quantized in one and missing in the other or of another size there.
    """
    for one in (base, model):
        if not isinstance(one, nnx.Module):
            raise QJaxError(f"models are nnx modules, as qjax.load gives them; got {type(one).__name__}")
    rows = windows_of(base, token_ids, window=window, max_windows=max_windows, batch_size=batch_size)
    windows_of(model, token_ids, window=window, max_windows=max_windows, batch_size=batch_size)
    pairs = _pairs(base, model)
    run = functools.partial(_measure, *nnx.split(base), *nnx.split(model), pairs=pairs)
    losses, sums = [], None
    for start in track(range(0, len(rows), batch_size), "comparing", show=progress):
        found, some = jax.tree.map(_on_host, run(rows[start : start + batch_size]))
        losses.append(found)
        sums = some if sums is None else [one + other for one, other in zip(sums, some, strict=True)]
    assert sums is not None, "there is a window"
    base_nll, nll, kl, agreed = np.concatenate(losses, axis=1).astype(np.float32)
    return Comparison(base_nll, nll, kl, agreed.astype(bool), tuple(map(_layer, pairs, sums)))


def _pairs(base: nnx.Module, model: nnx.Module) -> tuple[_Pair, ...]:
    """The layers that are quantized in one of the models.

    Raises:
      QJaxError: one that the other model lacks.
    """
    ours, theirs = _schemes(model), _schemes(base)
    names = (modules_of(model), modules_of(base))
    pairs = []
    for path, name in ours | theirs:
        schemes = theirs.get((path, name)), ours.get((path, name))
        lacking = [who for who, modules in zip(("the model", "the base"), names, strict=True) if path not in modules]
        if lacking:
            raise QJaxError(f"{path}: {lacking[0]} has no such layer: models of one architecture can be compared")
        pairs.append(_Pair(path, *schemes, name == "embedding"))
    return tuple(pairs)


def _schemes(model: nnx.Module) -> dict[tuple[str, str], str]:
    """Path and kernel's name of each quantized layer -> its scheme."""
    found = (layer for layer in layers(model) if is_qtensor(layer.kernel))
    return {(layer.path.replace(".", "/"), layer.name): str(layer.kernel.scheme) for layer in found}


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="pairs")
def _measure(
    base_definition: Any,
    base_state: Any,
    definition: Any,
    state: Any,
    ids: jax.Array,
    *,
    pairs: tuple[_Pair, ...],
) -> tuple[jax.Array, list[_Sums]]:
    """Losses `[4, B, S - 1]` (of the base, then as of `token_losses`), and the sums of each pair."""
    paths = [pair.path for pair in pairs]
    base = Recorded(base_definition, base_state, paths, ids)
    model = Recorded(definition, state, paths, ids)
    ours = token_losses(model.output, base.output, ids)
    theirs = token_losses(base.output, None, ids)
    return jnp.concatenate([theirs[:1], ours]), [_sums(pair, base, model) for pair in pairs]


def _sums(pair: _Pair, base: Recorded, model: Recorded) -> _Sums:
    """Of all calls of a layer."""
    wanted, found = base.calls(pair.path), model.calls(pair.path)
    for (x, y), (other_x, other_y) in zip(wanted, found, strict=True):
        if (x.shape, y.shape) != (other_x.shape, other_y.shape):
            sizes = [f"{a.shape[-1]} -> {b.shape[-1]}" for a, b in ((x, y), (other_x, other_y))]
            raise QJaxError(f"{pair.path}: {sizes[1]} channels, in the base {sizes[0]}")

    def channels(arrays: Iterable[jax.Array]) -> jax.Array:
        return jnp.concatenate([a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in arrays])

    y = channels(y for _, y in wanted)
    peak = power = None
    if not pair.is_table:
        x = channels(x for x, _ in wanted)
        peak, power = jnp.max(jnp.abs(x), axis=0), jnp.mean(x**2, axis=0)
    return _Sums(
        signal=jnp.sum(y**2, axis=0),
        noise=jnp.sum((channels(y for _, y in found) - y) ** 2, axis=0),
        own_noise=jnp.sum((channels(model.apply(pair.path, x) for x, _ in wanted) - y) ** 2, axis=0),
        peak=peak,
        power=power,
        tokens=jnp.float32(len(y)),
    )


def _on_host(a: jax.Array) -> np.ndarray:
    return np.asarray(a, np.float64)


def _layer(pair: _Pair, sums: _Sums) -> LayerComparison:
    known = (pair.path, pair.base_scheme, pair.scheme)
    return LayerComparison(*known, sums.signal, sums.noise, sums.own_noise, sums.peak, sums.power)
