"""How well a model predicts a text, and how far a quantized one strays from its base.

The text's tokens are cut into consecutive windows (the rest is left out). In each, every token but
the first is predicted from those before it in the window: perplexity is `exp` of the mean negative
log-likelihood in nats, KL the mean of KL(base || model) in nats, top-1 the share of predictions
with the base's most likely token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qjax.errors import QJaxError

# An nnx module or a function: int32 ids [B, S] -> logits [B, S, V].
type LanguageModel = nnx.Module | Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Perplexity:
    """`tokens` counts the predictions; `kl` and `top1` are None without a base."""

    perplexity: float
    windows: int
    tokens: int
    kl: float | None = None
    top1: float | None = None


def perplexity(
    model: LanguageModel,
    token_ids: Sequence[int] | np.ndarray | jax.Array,
    *,
    base: LanguageModel | None = None,
    window: int = 512,
    max_windows: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Measure `model` on a text, `batch_size` windows at a time in one jitted program.

    Args:
      model: gives logits `[B, S, V]` for int32 ids `[B, S]`.
      token_ids: the whole text, `[T]`, without special tokens.
      base: what `model` is compared with.
      window: tokens a window.
      max_windows: the first so many windows only.
      batch_size: windows at a time; logits take `4 * batch_size * window * V` bytes.

    Raises:
      QJaxError: no whole window, or token ids that the model does not have.
    """
    rows = windows_of(model, token_ids, window=window, max_windows=max_windows, batch_size=batch_size)
    windows = len(rows)
    sums = partial(_sums, *_split(model), *_split(base))
    totals = np.zeros(3)
    for start in range(0, windows, batch_size):
        some = rows[start : start + batch_size]
        batch = np.zeros((batch_size, window), np.int32)
        batch[: len(some)] = some  # one shape for all batches; the rows added are not counted
        totals += np.asarray(sums(batch), np.float64)[:, : len(some)].sum(axis=1)
    tokens = windows * (window - 1)
    nll, kl, agreed = (totals / tokens).tolist()
    if base is None:
        return Perplexity(math.exp(nll), windows, tokens)
    return Perplexity(math.exp(nll), windows, tokens, kl, agreed)


def windows_of(
    model: LanguageModel,
    token_ids: Sequence[int] | np.ndarray | jax.Array,
    *,
    window: int,
    max_windows: int | None,
    batch_size: int,
) -> np.ndarray:
    """The windows that `perplexity` measures, int32 `[W, window]`.

    Raises:
      QJaxError: no whole window, or token ids that the model does not have.
    """
    ids = _check_ids(model, token_ids)
    windows = min(len(ids) // max(window, 1), len(ids) if max_windows is None else max_windows)
    if window < 2 or windows < 1 or batch_size < 1:
        raise QJaxError(
            f"{len(ids)} tokens, {window=}, {max_windows=}, {batch_size=}: expected at least one "
            "window of two or more tokens"
        )
    return ids[: windows * window].reshape(windows, window).astype(np.int32)


def token_losses(logits: jax.Array, base_logits: jax.Array | None, ids: jax.Array) -> jax.Array:
    """Negative log-likelihood, KL(base || model) and agreement of each prediction: float32 `[3, B, S - 1]`.

    Args:
      logits: `[B, S, V]`.
      base_logits: of the base; without them KL and agreement are 0.
      ids: `[B, S]`.

    Raises:
      QJaxError: a base of another vocabulary.
    """

    def log_probabilities(logits: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)

    ours = log_probabilities(logits)
    nll = -jnp.take_along_axis(ours, ids[:, 1:, None], axis=-1)[..., 0]
    if base_logits is None:
        return jnp.stack([nll, jnp.zeros_like(nll), jnp.zeros_like(nll)])
    theirs = log_probabilities(base_logits)
    if theirs.shape != ours.shape:
        raise QJaxError(f"the base has {theirs.shape[-1]} tokens, the model {ours.shape[-1]}")
    kl = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    agreed = (jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1)).astype(jnp.float32)
    return jnp.stack([nll, kl, agreed])


@partial(jax.jit, static_argnums=(0, 2))
def _sums(definition: Any, state: Any, base_definition: Any, base_state: Any, ids: jax.Array) -> jax.Array:
    """Negative log-likelihood, KL and agreement of each window, summed over it: `[3, B]`."""

    def logits(definition: Any, state: Any) -> jax.Array:
        return (nnx.merge(definition, state) if isinstance(definition, nnx.GraphDef) else definition)(ids)

    base = None if base_definition is None else logits(base_definition, base_state)
    return token_losses(logits(definition, state), base, ids).sum(axis=-1)


def _split(model: LanguageModel | None) -> tuple[Any, Any]:
    """What jit hashes, and what it traces: weights are arguments, not constants of the program."""
    return nnx.split(model) if isinstance(model, nnx.Module) else (model, None)


def _check_ids(model: LanguageModel, token_ids: Any) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise QJaxError(f"token ids: expected integers [T], got {list(ids.shape)} of {ids.dtype}")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise QJaxError(
            f"token ids {ids.min()} to {ids.max()}, the model has 0 to {size - 1}: made by another tokenizer?"
        )
    return ids
