"""Merged projections give the same numbers, cut or whole, and what cannot be merged stays as it was."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from small_llama import small_llama

import qjax
import qjax.nnx
from qjax.errors import CheckpointError
from qjax.models import Llama, generate, merge
from qjax.models.merge import CutEmbed, MergedLinear
from qjax.qtensor import concat_rows

forward = nnx.jit(lambda model, ids: model(ids))
IDS = jnp.arange(12, dtype=jnp.int32)[None]


def made(**options: bool) -> Llama:
    model = small_llama(hidden=128, layers=2, heads=4, **options)
    for path, module in nnx.iter_modules(model):
        if getattr(module, "bias", None) is not None:
            module.bias.set_value(jax.random.normal(jax.random.key(len(path)), module.bias.shape))
    return model


@pytest.mark.parametrize(
    ("scheme", "biased"),
    [
        (None, False),
        (None, True),
        ("w4a16:group_size=32", False),
        ("w8a8_int8", True),
        ("nvfp4", False),
        ("fp8:granularity=tensor", True),
    ],
)
def test_a_merged_model_gives_the_logits_of_the_model_it_was(scheme, biased):
    model = made(qkv_bias=biased, mlp_bias=biased)
    if scheme is not None:
        qjax.nnx.quantize(model, scheme)
    apart = forward(model, IDS)
    merge(model)
    attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
    assert attention.qkv_proj.sizes == (128, 64, 64) and not hasattr(attention, "q_proj")
    assert mlp.gate_up_proj.linear.kernel.get_value().shape == (128, 384) and not hasattr(mlp, "up_proj")
    np.testing.assert_allclose(forward(model, IDS), apart, atol=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scheme", [None, "w4a16:group_size=32"])
def test_on_a_mesh_every_device_keeps_its_own_range_of_each_projection(pylm_folder, scheme, kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    alone, cut = qjax.load(pylm_folder), qjax.load(pylm_folder, mesh=mesh)
    before = cut.layers[0].self_attn.q_proj.kernel.get_value().addressable_shards[1].data
    if scheme is not None:
        for model in (alone, cut):
            qjax.nnx.quantize(model, scheme)
    merge(cut)
    merged = cut.layers[0].self_attn.qkv_proj
    kernel = merged.linear.kernel.get_value()
    if scheme is None:
        np.testing.assert_array_equal(kernel.addressable_shards[1].data[:, : before.shape[1]], before)
    else:
        assert kernel.packed.addressable_shards[0].data.shape[0] * 2 == kernel.packed.shape[0]
    if kind == AxisType.Auto:
        program = nnx.jit(lambda merged, x: merged(x)).lower(merged, jnp.ones((1, kernel.shape[0]))).compile()
        assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())
    np.testing.assert_allclose(forward(cut, IDS), forward(alone, IDS), atol=2e-4)


def test_projections_of_other_schemes_stay_apart():
    model = made()
    qjax.nnx.quantize(model, {r".*/q_proj": "w8a16", r".*/gate_proj": "nf4", r".*/up_proj": "nf4"})
    before = forward(model, IDS)
    merge(model)
    assert model.layers[0].self_attn.qkv_proj is None
    assert isinstance(model.layers[0].mlp.gate_up_proj, MergedLinear)
    np.testing.assert_allclose(forward(model, IDS), before, atol=2e-5)


def test_merging_twice_changes_nothing_more():
    model = merge(made())
    merged = model.layers[0].mlp.gate_up_proj
    assert merge(model).layers[0].mlp.gate_up_proj is merged


def test_a_merged_model_is_not_saved(pylm_folder, tmp_path):
    model = merge(qjax.load(pylm_folder))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate_up_proj: is merged"):
        qjax.save(model, tmp_path / "out", source=pylm_folder)


def test_shares_interleave_the_rows_of_every_part():
    kernels = jax.random.normal(jax.random.key(0), (2, 128, 64))
    parts = [qjax.quantize_array(w, "w4a16:group_size=64,symmetric=false") for w in kernels]
    whole = concat_rows(parts, shares=2).dequantize()
    first, second = (part.dequantize() for part in parts)
    expected = np.concatenate([first[:, :32], second[:, :32], first[:, 32:], second[:, 32:]], axis=1)
    np.testing.assert_array_equal(whole, expected)
    with pytest.raises(ValueError, match=r"N=\[64, 64\] have no 3 equal shares"):
        concat_rows(parts, shares=3)


def test_one_token_is_looked_up_where_its_row_lies(pylm_folder):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    alone, cut = (merge(qjax.load(pylm_folder, mesh=m)) for m in (None, mesh))
    assert type(alone.embed_tokens) is nnx.Embed and type(cut.embed_tokens) is CutEmbed
    one = jnp.array([[7]])
    np.testing.assert_array_equal(cut.embed_tokens(one), alone.embed_tokens(one))
    assert generate(cut, [[7]], max_new_tokens=6) == generate(alone, [[7]], max_new_tokens=6)
