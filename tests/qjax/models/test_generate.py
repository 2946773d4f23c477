"""Greedy continuations are the reference's, sampling keeps its promises, and little is compiled."""

import dataclasses
import sys
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax import devices
from qjax.errors import GenerationError
from qjax.models import generate
from qjax.models.generate import Sampling, bucket, decode, pick, prefill


def test_greedy_continuations_of_the_real_model_are_the_references_token_for_token(pylm, reference):
    prompts = [reference[f"prompt{i}_ids"] for i in range(3)]
    assert len({len(prompt) for prompt in prompts}) == 3
    together = generate(pylm, prompts, max_new_tokens=64)
    for i in range(3):
        assert together[i] == reference[f"continuation{i}_ids"].tolist()
    assert generate(pylm, prompts[1:2], max_new_tokens=64) == [together[1]]


def test_one_prefill_and_one_decode_are_compiled_for_each_bucket(small):
    rng = np.random.default_rng(0)
    prefill.clear_cache()
    decode.clear_cache()
    for length in (3, 9, 14, 16):
        generate(small, [rng.integers(0, 32, length)], max_new_tokens=10)
    assert prefill._cache_size() == 2  # one for each capacity: 16 and 32
    assert decode._cache_size() == 2
    for temperature, top_k, top_p in ((0.5, 3, 0.9), (2.0, 7, 0.2)):
        settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        generate(small, [[1, 2]], max_new_tokens=10, **settings)
    assert decode._cache_size() == 3
    generate(small, [rng.integers(0, 32, 17)], max_new_tokens=3)
    assert prefill._cache_size() == 4


def test_decoding_takes_over_the_memory_of_the_cache(small):
    definition, state = nnx.split(small)
    ids = positions = np.arange(16, dtype=np.int32)[None]
    tokens, cache = prefill(definition, state, ids, positions, None, capacity=32)
    decode(definition, state, tokens, cache, None, 1, count=4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_a_stop_token_ends_its_row_only_and_is_its_last(small):
    free = generate(small, [[1, 2, 3], [4, 5]], max_new_tokens=12)
    stop = free[0][4]
    stopped = generate(small, [[1, 2, 3], [4, 5]], max_new_tokens=12, stop_tokens=[stop])
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 17])
def test_any_number_of_tokens_is_the_beginning_of_more(small, count):
    whole = generate(small, [[1, 2, 3]], max_new_tokens=24)
    assert generate(small, [[1, 2, 3]], max_new_tokens=count) == [whole[0][:count]]


def test_the_callback_sees_every_token_as_it_comes(small):
    seen: list[tuple[int, int]] = []
    rows = generate(small, [[1, 2], [3]], max_new_tokens=5, callback=lambda row, token: seen.append((row, token)))
    assert [row for row, _ in seen] == [0, 1] * 5
    for i, row in enumerate(rows):
        assert [token for r, token in seen if r == i] == row


def test_the_same_seed_gives_the_same_text_and_another_another(small):
    settings = dict(max_new_tokens=20, temperature=1.5)
    first = generate(small, [[1, 2], [1, 2]], seed=3, **settings)
    assert first == generate(small, [[1, 2], [1, 2]], seed=jax.random.key(3), **settings)
    assert first != generate(small, [[1, 2], [1, 2]], seed=4, **settings)
    assert first[0] != first[1]


def test_a_row_does_not_depend_on_the_rows_after_it(small):
    settings = dict(max_new_tokens=10, temperature=1.0, seed=5)
    assert generate(small, [[7, 8], [1]], **settings)[0] == generate(small, [[7, 8]], **settings)[0]


def test_generation_may_fill_the_last_position(small):
    rows = generate(small, [np.arange(30)], max_new_tokens=34)
    assert len(rows[0]) == 34
    whole = np.concatenate([np.arange(30), rows[0]])
    logits = jax.jit(lambda ids: small(ids))(jnp.asarray(whole[None]))
    assert np.argmax(logits[0, 29:-1], axis=-1).tolist() == rows[0]


@pytest.mark.slow
def test_a_long_prompt_up_to_the_limit_and_a_short_one_are_each_written_as_alone(pylm, reference):
    long = np.resize(reference["prompt0_ids"], pylm.config.max_positions - 12).tolist()
    short = reference["prompt1_ids"].tolist()
    together = generate(pylm, [long, short], max_new_tokens=12)
    assert generate(pylm, [short], max_new_tokens=12) == together[1:]
    whole = jnp.asarray([long + together[0]])
    logits = np.asarray(jax.jit(lambda ids: pylm(ids))(whole))[0, len(long) - 1 : -1]
    assert np.argmax(logits, axis=-1).tolist() == together[0]


def draws(logits: list[float], count: int = 4000, **settings: float) -> Counter:
    values = {key: jnp.asarray(value) for key, value in settings.items()}
    sampling = Sampling(
        jax.random.key(0), values.get("temperature", jnp.float32(1)), values.get("top_k"), values.get("top_p")
    )
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    return Counter(np.asarray(jax.jit(pick)(rows, sampling, 0)).tolist())


LIKELIHOODS = [0.1, 0.4, 0.15, 0.3, 0.05]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LIKELIHOODS),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 99}, LIKELIHOODS),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, LIKELIHOODS),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.4 + 0.3 of the 0.85 kept
        ({"temperature": 0.5}, [0.01 / 0.285, 0.16 / 0.285, 0.0225 / 0.285, 0.09 / 0.285, 0.0025 / 0.285]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_settings_say(settings, expected):
    counts = draws(np.log(LIKELIHOODS).tolist(), **settings)
    shares = np.array([counts[token] / 4000 for token in range(5)])
    np.testing.assert_allclose(shares, expected, atol=0.03)  # four standard deviations
    assert all(counts[token] == 0 for token in range(5) if expected[token] == 0)


def test_without_sampling_the_first_of_the_likeliest_tokens_is_taken():
    chex.assert_trees_all_equal(pick(jnp.array([[0.0, 2.0, 2.0]]), None, 0), jnp.array([1], jnp.int32))


@pytest.mark.parametrize("length", [1, 16, 17, 32, 1000])
def test_a_bucket_is_the_next_power_of_two(length):
    size = bucket(length)
    assert size >= length and size & (size - 1) == 0 and (size == 16 or size < 2 * length)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0: expected a non-empty sequence"),
        ([1, 2, 3], {}, r"prompt 0: .* one prompt is a batch of one: \[ids\]"),
        ([[0.5]], {}, "prompt 0: .* of float64"),
        ([[1], [2, 32]], {}, "prompt 1: token ids 2 to 32; allowed: 0 to 31"),
        ([[-1]], {}, "token ids -1 to -1"),
        ([[1] * 65], {}, "65 tokens .* exceed the model's 64 positions; room for new tokens: 0"),
        ([[1], [1] * 60], {"max_new_tokens": 5}, "prompt 1: 60 tokens.*room for new tokens: 4"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        (
            [[1]],
            {"cache_dtype": "bfloat16"},
            "cache_dtype=bfloat16; a cache is int8, fp8 or as the model's activations, float32",
        ),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_what_cannot_be_generated_is_refused(small, prompts, settings, message):
    with pytest.raises(GenerationError, match=message):
        generate(small, prompts, **({"max_new_tokens": 1} | settings))


def test_where_memory_runs_out_it_says_what_would_fit(small, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    a_row = jax.eval_shape(lambda: small.empty_cache(1, 16))
    weights, cache = (
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) for tree in (nnx.state(small), a_row)
    )
    row = devices.current()
    monkeypatch.setattr(devices, "current", lambda: dataclasses.replace(row, memory=int((weights + 3.6 * cache) / 0.9)))
    monkeypatch.setattr(sys.modules["qjax.models.generate"], "prefill", full)
    with pytest.raises(
        GenerationError, match='about 3 such rows, or for 7 of 8 tokens; cache_dtype="int8" takes about half'
    ):
        generate(small, [[1]] * 7, max_new_tokens=4)
    monkeypatch.setattr(devices, "current", lambda: dataclasses.replace(row, memory=weights))
    with pytest.raises(GenerationError, match="weights of fewer bits, or a mesh of more devices"):
        generate(small, [[1]] * 7, max_new_tokens=4, cache_dtype="int8")
    monkeypatch.setattr(devices, "current", lambda: dataclasses.replace(row, memory=2 * (weights + 9 * cache)))
    with pytest.raises(GenerationError, match="they would fit: what is left is too little"):
        generate(small, [[1]] * 7, max_new_tokens=4)


def test_other_failures_of_a_program_are_left_as_they_are(small, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(sys.modules["qjax.models.generate"], "prefill", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        generate(small, [[1]], max_new_tokens=4)
