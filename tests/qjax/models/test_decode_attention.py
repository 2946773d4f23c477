"""A model whose steps attend by the kernel, interpreted, writes what it writes by plain JAX; why it does not run."""

import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax
from pallas_kernels.triton import decode_attention as kernel
from qjax.models import Llama, LlamaConfig, decode_attention, generate, merge
from qjax.models.decode_attention import KERNEL, plain_because
from qjax.models.kv_cache import KVCache, LayerCache
from qjax.models.rope import Rope

IDS = jnp.array([[1], [2], [3]], jnp.int32)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """As if on an H200; collects the static arguments of each kernel."""
    calls: list[dict] = []

    def run(*operands: jax.Array, **static: float) -> tuple[jax.Array, ...]:
        calls.append({**static, "shape": operands[-1].shape})
        return kernel.decode_attention(*operands, **static, interpret=True)

    module = SimpleNamespace(decode_attention=run, unsupported=kernel.unsupported)
    monkeypatch.setattr(decode_attention, "load_if_present", lambda row: module if row is KERNEL else None)
    for traced in (decode_attention._batchable, decode_attention._auto):  # what was traced before calls another `run`
        traced.cache_clear()
    with qjax.use(device="h200"):
        yield calls


def made(**changes: object) -> Llama:
    config = LlamaConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope=Rope("default", 10000.0, 16, 64),
        rms_norm_eps=1e-5,
    )
    return Llama(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def step(model: Llama, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    return nnx.jit(lambda model, ids, cache: model(ids, cache))(model, ids, cache)


def filled(model: Llama) -> KVCache:
    """Rows of 3, 0 and 15 tokens in a cache of 16."""
    key = iter(jax.random.split(jax.random.key(1), 2))
    cache = model.empty_cache(3, 16)
    layers = tuple(
        LayerCache(*(jax.random.normal(next(key), a.shape, a.dtype) for a in (c.keys, c.values))) for c in cache.layers
    )
    return KVCache(layers, jnp.array([3, 0, 15], jnp.int32))


OPTIONS = {
    "grouped heads": {},
    "a window and a cap": {"sliding_windows": (4,), "attention_softcap": 2.0, "query_scale": 0.5},
    "norms of heads": {"qk_norm": True, "qkv_bias": True},
}


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_gives_the_logits_and_the_cache_of_the_plain_one(options, merged, interpreted):
    model = merge(made(**options)) if merged else made(**options)
    fused = step(model, IDS, filled(model))
    assert len(interpreted) == 1
    with qjax.use(device="cpu"):
        plain = step(model, IDS, filled(model))
    assert len(interpreted) == 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), fused, plain)


def test_greedy_tokens_are_those_of_the_plain_path(pylm, interpreted):
    found = generate(pylm, PROMPTS, max_new_tokens=12)
    assert {call["shape"] for call in interpreted} == {(3, *interpreted[0]["shape"][1:])}
    with qjax.use(device="cpu"):
        assert generate(pylm, PROMPTS, max_new_tokens=12) == found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_of_codes_is_read_by_the_kernel_as_by_plain_jax(kind, pylm_folder, interpreted):
    model = qjax.load(pylm_folder, dtype=jnp.bfloat16)
    found = generate(model, PROMPTS, max_new_tokens=6, cache_dtype=kind)
    assert interpreted
    with qjax.use(device="cpu"):
        plain = generate(model, PROMPTS, max_new_tokens=6, cache_dtype=kind)
    same = [a == b for row, other in zip(found, plain, strict=True) for a, b in zip(row, other, strict=True)]
    assert np.mean(same) > 0.8, "other sums may break ties"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_each_device_attends_with_its_own_heads(pylm_folder, kind, interpreted):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    alone, cut = qjax.load(pylm_folder), qjax.load(pylm_folder, mesh=mesh)
    found = generate(cut, PROMPTS, max_new_tokens=4)
    if kind == AxisType.Auto:  # on Explicit axes a cache comes out of prefill whole
        whole = alone.config.num_key_value_heads
        assert {call["shape"][1] for call in interpreted} == {whole, whole // 2}, "traced whole, then as it is cut"
    with qjax.use(device="cpu"):
        assert generate(alone, PROMPTS, max_new_tokens=4) == found


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)], ids=["of their own", "one for all"])
def test_heads_that_share_none_or_one_attend_on_a_mesh(heads, kv_heads, interpreted):
    model = made(num_attention_heads=heads, num_key_value_heads=kv_heads)
    with qjax.use(device="cpu"):
        expected, _ = step(model, IDS, filled(model))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec())))
    found, _ = step(model, IDS, filled(model))
    assert interpreted
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_batched_by_vmap_attend_on_their_own(interpreted):
    model = made()
    cache = filled(model)
    with qjax.use(device="cpu"):
        expected, _ = step(model, IDS, cache)
    one = nnx.vmap(lambda model, ids, cache: model(ids, cache), in_axes=(None, 0, 0))
    found, _ = one(model, IDS[:, None], jax.tree.map(lambda a: a[:, None], cache))
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_where_it_does_not_run_there_is_a_reason():
    cache = made().empty_cache(1, 16).layers[0]

    def why(length: int = 1, dtype: str = "float32", cache: LayerCache | None = cache) -> str:
        return plain_because(length, 4, dtype, cache)

    assert "this is CPU" in why()
    with qjax.use(device="h200"):
        assert why() is None
        assert "here are 2" in why(length=2)
        assert "a cache: False" in why(cache=None)
        assert "the cache is float32" in why(dtype="bfloat16")
    with qjax.use(device="t4"):
        assert "from compute capability 8.0 on" in why()
    with qjax.use(device="h200", backend="xla"):
        assert why() == "xla was asked for"
    with qjax.use(device="h200", backend="triton.matmul_packed"):
        assert why() is None


def test_a_lost_folder_costs_the_kernel_only(monkeypatch):
    monkeypatch.setattr(decode_attention, "load_if_present", lambda row: None)
    with qjax.use(device="h200"):
        assert "is absent" in plain_because(1, 4, "float32", made().empty_cache(1, 16).layers[0])
        assert len(generate(made(), [[1, 2]], max_new_tokens=3)[0]) == 3
