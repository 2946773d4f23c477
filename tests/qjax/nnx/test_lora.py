"""Adapters beside quantized layers: what is trained, what stays, and what merging makes of both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_llama import small_llama

import qjax
import qjax.nnx
from qjax.errors import CheckpointError, RuleError

SCHEME = "w4a16:group_size=16"


@pytest.fixture
def llama():
    return qjax.nnx.quantize(small_llama(hidden=32, layers=2), SCHEME)


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(0), (4, 12), 0, 32)


def loss(model, ids):
    logits = model(ids)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def trained(model, ids, steps=12):
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, ids):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, ids)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer, ids)) for _ in range(steps)], optimizer


def test_adapters_begin_as_nothing_and_alone_are_trained(llama, ids):
    before, codes = llama(ids), np.asarray(llama.layers[0].mlp.up_proj.kernel.get_value().packed)
    qjax.nnx.add_lora(llama, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(llama(ids), before)
    losses, optimizer = trained(llama, ids)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_array_equal(llama.layers[0].mlp.up_proj.base.kernel.get_value().packed, codes)
    adapters = sum(a.size for a in jax.tree.leaves(nnx.state(llama, nnx.LoRAParam)))
    assert sum(a.size for a in jax.tree.leaves(nnx.state(optimizer, nnx.OptState))) == 2 * adapters + 2


def test_the_gradient_is_that_of_the_float_product(ids):
    layer = qjax.nnx.quantize(nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0))), SCHEME)
    qjax.nnx.add_lora(layer, 2, rngs=nnx.Rngs(1))
    lora, w = layer.layers[0].lora, layer.layers[0].base.kernel.get_value().dequantize()
    lora.lora_b[...] = jnp.ones((2, 16))
    x = jax.random.normal(jax.random.key(2), (5, 32))
    found = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    wanted = jax.grad(lambda a: jnp.sum(jnp.sin(x @ w + x @ a @ lora.lora_b[...])))(lora.lora_a[...])
    np.testing.assert_allclose(found["layers"][0]["lora"]["lora_a"][...], wanted, rtol=1e-4, atol=1e-5)


def test_an_expression_says_which_layers(llama):
    qjax.nnx.add_lora(llama, 2, layers=r"layers/\d+/self_attn/(q|v)_proj", rngs=nnx.Rngs(0))
    assert type(llama.layers[1].self_attn.v_proj) is qjax.nnx.QLoRALinear
    assert type(llama.layers[1].self_attn.k_proj) is qjax.nnx.QLinear
    with pytest.raises(RuleError, match="matches 0 quantized layers; there are .*down_proj"):
        qjax.nnx.add_lora(llama, 2, layers="head", rngs=nnx.Rngs(0))


def test_merging_rounds_the_sum_and_nothing_else(llama, ids):
    qjax.nnx.add_lora(llama, 4, rngs=nnx.Rngs(0))
    trained(llama, ids)
    layer = llama.layers[0].mlp.down_proj
    total = layer.base.kernel.get_value().dequantize() + layer.lora.lora_a[...] @ layer.lora.lora_b[...]
    kept = llama(ids)
    qjax.nnx.merge_lora(llama, "w8a16")
    assert type(layer) is qjax.nnx.QLinear
    np.testing.assert_allclose(layer.kernel.get_value().dequantize(), total, atol=float(jnp.abs(total).max()) / 200)
    np.testing.assert_allclose(llama(ids), kept, atol=0.05 * float(jnp.abs(kept).max()))
    with pytest.raises(RuleError, match="no QLoRALinear"):
        qjax.nnx.merge_lora(llama)


def test_a_folder_has_no_place_for_adapters(llama, tmp_path):
    qjax.nnx.add_lora(llama, 2, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="_proj: has an adapter"):
        qjax.save(llama, tmp_path / "out", source="examples/pylm-4m")
