"""The real model: logits, layer by layer names, caches, dtypes, meshes."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax
from qjax.checkpoints import CheckpointFiles
from qjax.errors import QJaxError
from qjax.models import Llama, load_llama
from qjax.models.kv_cache import CODED
from qjax.models.llama import RMSNorm, attend, causal_mask

forward = nnx.jit(lambda model, ids: model(ids))
cached = nnx.jit(Llama.__call__)


def test_logits_of_the_real_model_are_those_of_transformers(pylm, reference):
    logits = forward(pylm, reference["input_ids"][None])
    assert logits.dtype == jnp.float32
    shown = np.asarray(logits)[0, reference["positions"]]
    np.testing.assert_allclose(shown, reference["logits"], atol=1e-4, rtol=0)


def test_modules_are_named_as_the_tensors_of_the_checkpoint(pylm):
    linears = {".".join(map(str, path)) for path, module in nnx.iter_modules(pylm) if isinstance(module, nnx.Linear)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    mlp = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert linears == {f"layers.{i}.{name}" for i in range(4) for name in attention | mlp}


def test_a_linear_may_be_replaced_by_any_module_with_its_call(small):
    class Doubled(nnx.Module):
        def __init__(self, inner: nnx.Linear) -> None:
            self.inner = inner

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(2 * x)

    model = nnx.clone(small)
    ids = jnp.arange(8)[None]
    for layer in model.layers:
        layer.mlp.up_proj = Doubled(layer.mlp.up_proj)
    swapped = forward(model, ids)
    for layer in model.layers:
        linear = layer.mlp.up_proj.inner
        linear.kernel.set_value(2 * linear.kernel.get_value())
        layer.mlp.up_proj = linear
    np.testing.assert_allclose(swapped, forward(model, ids), atol=1e-6)
    assert np.abs(swapped - forward(small, ids)).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_activations_stay_close_to_float32(pylm_folder, pylm, reference, dtype):
    model = load_llama(CheckpointFiles.open(pylm_folder), dtype=dtype)
    ids = jnp.asarray(reference["input_ids"][None])
    assert jax.eval_shape(lambda: model.hidden_states(ids)[0]).dtype == dtype
    logits = forward(model, ids)
    assert logits.dtype == jnp.float32
    # Logits span 44; an eps of 2^-8 over four layers moves them by a few tenths.
    assert np.abs(logits - forward(pylm, ids)).mean() < (0.15 if dtype == jnp.bfloat16 else 0.02)


def test_padding_neither_enters_the_cache_nor_disturbs_other_tokens(small):
    ids = jnp.array([[5, 6, 7, 8, 9, 10]])
    positions = jnp.array([[0, 1, 2, 3, -1, -1]])
    logits, cache = cached(small, ids, small.empty_cache(1, 8), positions)
    np.testing.assert_allclose(logits[:, :4], forward(small, ids[:, :4]), atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [4])
    for layer in cache.layers:
        assert np.all(np.asarray(layer.keys)[:, :, 4:] == 0)
        assert np.all(np.asarray(layer.keys)[:, :, :4] != 0)
    chex.assert_tree_all_finite(logits)


def test_rows_of_different_lengths_share_a_cache(small):
    rows = [jnp.array([3, 4, 5, 6, 7]), jnp.array([9, 8])]
    ids = jnp.array([[3, 4, 5, 6, 7], [9, 8, 0, 0, 0]])
    positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    _, cache = cached(small, ids, small.empty_cache(2, 8), positions)
    logits, cache = cached(small, jnp.array([[11], [12]]), cache)
    np.testing.assert_array_equal(cache.lengths, [6, 3])
    for i, row in enumerate(rows):
        alone = forward(small, jnp.append(row, 11 + i)[None])
        np.testing.assert_allclose(logits[i, 0], alone[0, -1], atol=1e-5)


def test_a_cache_is_a_pytree_that_can_be_donated(small):
    step = jax.jit(lambda c: jax.tree.map(lambda leaf: leaf + 1, c), donate_argnums=0)
    cache = small.empty_cache(2, 4)
    after = step(cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    np.testing.assert_array_equal(after.lengths, [1, 1])
    assert after.capacity == 4


@pytest.mark.parametrize("ids", [jnp.zeros((1, 4)), jnp.zeros(4, jnp.int32)], ids=["floats", "one axis"])
def test_ids_of_another_kind_are_refused(small, ids):
    with pytest.raises(QJaxError, match=rf"input_ids: expected integers \[B, S\], got {ids.dtype} "):
        small(ids)


def test_rms_norm_squares_in_float32():
    norm = RMSNorm(4, epsilon=1e-6, param_dtype=jnp.float32)
    large = jnp.full((1, 4), 300.0, jnp.float16)  # its square is not a float16
    np.testing.assert_array_equal(norm(large), np.ones((1, 4), np.float16))


@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 1, 50), (2, 96)], ids=["in parts", "whole", "two rows"])
def test_rms_norm_of_one_row_in_parts_is_that_of_many(shape):
    x = jax.random.normal(jax.random.key(0), shape) * 5
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    norm = RMSNorm(shape[-1], epsilon=1e-6, param_dtype=jnp.float32)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", CODED)
def test_codes_of_a_cache_are_within_half_a_step_and_padding_is_not_stored(small, kind):
    keys, values = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 8))
    empty = small.empty_cache(1, 4, CODED[kind]).layers[0]
    layer = empty.store(keys, values, jnp.array([[2, 0, -1]]))
    assert layer.keys.dtype == layer.values.dtype == CODED[kind]
    for read, written in zip(layer.read(jnp.float32), (keys, values), strict=True):
        largest = np.abs(written).max(axis=-1, keepdims=True)
        step = largest / 127 if kind == "int8" else np.maximum(np.abs(written) / 8, largest / 448 * 2.0**-9)
        assert np.all(np.abs(read[:, :, [2, 0]] - written[:, :, :2]) <= 0.501 * step[:, :, :2])
        np.testing.assert_array_equal(read[:, :, [1, 3]], np.zeros((1, 1, 2, 8)))


def test_a_window_of_three_shows_a_query_itself_and_two_before():
    mask = causal_mask(jnp.array([[4]]), jnp.array([[0, 1, 2, 3, 4, 5, -1]]), 3)
    np.testing.assert_array_equal(mask[0, 0], [False, False, True, True, True, False, False])


def test_attention_is_softmax_of_scores_over_the_mask():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 5, 4)).astype(np.float32)
    mask = rng.random((2, 5, 5)) < 0.6
    mask[:, :, 0] = True
    got = attend(*map(jnp.asarray, (queries, keys, values, mask)))
    for head in range(6):
        scores = np.einsum("bsd,btd->bst", queries[:, :, head], keys[:, head // 3]) / 2
        weights = np.exp(scores) * mask
        weights /= weights.sum(-1, keepdims=True)
        expected = weights @ values[:, head // 3]
        np.testing.assert_allclose(got[..., head * 4 : head * 4 + 4], expected, atol=1e-5)


MESHES = {"tensor": {"model": 4}, "fsdp_and_tensor": {"fsdp": 2, "model": 4}, "data": {"data": 8}}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_mesh_gives_the_logits_of_one_device(pylm_folder: Path, reference, kind, axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    model = load_llama(CheckpointFiles.open(pylm_folder), dtype=jnp.float32, mesh=mesh)
    kernel = model.layers[0].mlp.down_proj.kernel.get_value()
    cut = axes.get("model", 1) * axes.get("fsdp", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // cut
    ids = jnp.tile(reference["input_ids"], (8, 1))
    if "data" in axes:
        ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    logits = np.asarray(forward(model, ids))[3, reference["positions"]]
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)
    with jax.set_mesh(mesh):
        logits, cache = cached(model, ids, model.empty_cache(8, 64))
    shown = np.asarray(logits)[5, reference["positions"]]
    np.testing.assert_allclose(shown, reference["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_quantized_model_on_a_mesh_in_context_gives_the_logits_of_one_device(pylm_folder: Path, reference, kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    models = [load_llama(CheckpointFiles.open(pylm_folder), dtype=jnp.float32, mesh=m) for m in (None, mesh)]
    for model in models:
        qjax.nnx.quantize(model, "w4a16:group_size=64")
    ids = reference["input_ids"][None]
    alone = forward(models[0], ids)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(forward(models[1], ids), alone, atol=2e-4, rtol=0)
        logits, _ = cached(models[1], ids, models[1].empty_cache(1, 64))
    np.testing.assert_allclose(logits, alone, atol=2e-4, rtol=0)
