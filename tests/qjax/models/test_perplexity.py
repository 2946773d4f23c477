"""Perplexity, KL and top-1 agreement against their definitions and the real model's reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.errors import QJaxError
from qjax.models import Llama, load_tokenizer, perplexity


def test_the_real_model_has_the_perplexity_of_the_reference(pylm, pylm_folder):
    text = (pylm_folder / "eval.txt").read_text()
    ids = load_tokenizer(pylm_folder).encode(text, add_special_tokens=False)
    assert len(ids) == 62_452
    result = perplexity(pylm, ids, max_windows=40)
    assert (result.windows, result.tokens) == (40, 20_440)
    assert result.perplexity == pytest.approx(10.855397, rel=1e-5)
    assert result.kl is None and result.top1 is None


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_it_is_what_the_definition_says(small, batch_size):
    other = nnx.clone(small)
    other.norm.weight.set_value(1.5 * other.norm.weight.get_value())
    ids = np.random.default_rng(0).integers(0, 32, 3 * 16 + 5)
    windows = ids[:48].reshape(3, 16)
    forward = nnx.jit(lambda model, ids: model(ids))
    ours, theirs = (softmax(forward(model, windows)[:, :-1]) for model in (other, small))
    likelihood = np.take_along_axis(ours, windows[:, 1:, None], axis=-1)
    result = perplexity(other, ids, base=small, window=16, batch_size=batch_size)
    assert (result.windows, result.tokens) == (3, 45)
    assert result.perplexity == pytest.approx(np.exp(-np.log(likelihood).mean()), rel=1e-5)
    assert result.kl == pytest.approx((theirs * np.log(theirs / ours)).sum(-1).mean(), rel=1e-4)
    assert result.top1 == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert result.kl > 0.001


def test_a_model_does_not_stray_from_itself(small):
    result = perplexity(small, np.arange(32), base=small, window=16)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1 == 1


def test_a_function_is_a_model_too():
    """One that knows the next token with probability 3 / 4 of two."""

    def model(ids: jax.Array) -> jax.Array:
        return jnp.log(jnp.where(jax.nn.one_hot(1 - ids, 2) == 1, 0.75, 0.25))

    result = perplexity(model, np.tile([0, 1], 20), window=10)
    assert result.perplexity == pytest.approx(4 / 3, rel=1e-6)


def test_all_batches_run_in_one_program(small):
    traces = 0

    def model(ids: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return small(ids)

    perplexity(model, np.arange(32).repeat(5), window=16, batch_size=4)
    assert traces == 1


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (np.arange(15), {}, "15 tokens, window=16.*expected at least one window"),
        (np.arange(32), {"max_windows": 0}, "max_windows=0"),
        (np.arange(32), {"window": 1}, "window=1"),
        (np.arange(32) / 2, {}, r"expected integers \[T\], got \[32\] of float64"),
        (np.arange(32)[None], {}, r"got \[1, 32\]"),
        (np.arange(33), {}, "token ids 0 to 32, the model has 0 to 31"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(small, ids, settings, message):
    with pytest.raises(QJaxError, match=message):
        perplexity(small, ids, **({"window": 16} | settings))


def test_a_base_of_another_vocabulary_is_refused(small):
    fewer = Llama(dataclasses.replace(small.config, vocab_size=31), rngs=nnx.Rngs(0))
    with pytest.raises(QJaxError, match="the base has 31 tokens, the model 32"):
        perplexity(small, np.arange(31), base=fewer, window=16)
