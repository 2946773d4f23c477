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
    ids = _check_ids(model, token_ids)
    windows = min(len(ids) // window, len(ids) if max_windows is None else max_windows)
    if window < 2 or windows < 1 or batch_size < 1:
        raise QJaxError(
            f"{len(ids)} tokens, {window=}, {max_windows=}, {batch_size=}: expected at least one "
            "window of two or more tokens"
        )
    sums = partial(_sums, *_split(model), *_split(base))
    totals = np.zeros(3)
    for start in range(0, windows, batch_size):
        rows = ids[start * window : min(start + batch_size, windows) * window].reshape(-1, window)
        batch = np.zeros((batch_size, window), np.int32)
        batch[: len(rows)] = rows  # one shape for all batches; the rows added are not counted
        totals += np.asarray(sums(batch), np.float64)[:, : len(rows)].sum(axis=1)
    tokens = windows * (window - 1)
    nll, kl, agreed = (totals / tokens).tolist()
    if base is None:
        return Perplexity(math.exp(nll), windows, tokens)
    return Perplexity(math.exp(nll), windows, tokens, kl, agreed)


@partial(jax.jit, static_argnums=(0, 2))
def _sums(definition: Any, state: Any, base_definition: Any, base_state: Any, ids: jax.Array) -> jax.Array:
    """Negative log-likelihood, KL and agreement of each window, summed over it: `[3, B]`."""

    def log_probabilities(definition: Any, state: Any) -> jax.Array:
        if isinstance(definition, nnx.GraphDef):
            definition = nnx.merge(definition, state)
        return jax.nn.log_softmax(definition(ids)[:, :-1].astype(jnp.float32), axis=-1)

    ours = log_probabilities(definition, state)
    nll = -jnp.take_along_axis(ours, ids[:, 1:, None], axis=-1)[..., 0]
    if base_definition is None:
        kl = agreed = jnp.zeros_like(nll)
    else:
        theirs = log_probabilities(base_definition, base_state)
        if theirs.shape != ours.shape:
            raise QJaxError(f"the base has {theirs.shape[-1]} tokens, the model {ours.shape[-1]}")
        kl = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        agreed = (jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1)).astype(jnp.float32)
    return jnp.stack([nll, kl, agreed]).sum(axis=-1)


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
