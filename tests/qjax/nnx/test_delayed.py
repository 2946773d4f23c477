"""Delayed scales in nnx: Variables beside the kernel, under nnx's own transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_llama import small_llama

import qjax
import qjax.nnx
from qjax.errors import CheckpointError

SCHEME = "w8a8_fp8:mode=delayed,history=4"


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.middle = nnx.LinearGeneral(32, (2, 8), rngs=rngs)
        self.out = nnx.Einsum("bnd,ndf->bf", (2, 8, 16), rngs=rngs)

    def __call__(self, x):
        return self.out(self.middle(nnx.relu(self.up(x))))


@pytest.fixture
def model():
    return qjax.nnx.quantize(Model(nnx.Rngs(0)), SCHEME)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (8, 16))


def test_each_layer_has_its_history(model, x):
    call = nnx.jit(lambda model, x: model(x))
    for factor in (1, 3, 2):
        call(model, factor * x)
    largest = float(jnp.abs(x).max())
    np.testing.assert_allclose(model.up.delayed.amax_history[...], [2 * largest, 3 * largest, largest, 0], rtol=1e-6)
    np.testing.assert_allclose(model.up.delayed.act_scale[...], 3 * largest / 448, rtol=1e-6)
    assert all(float(layer.delayed.act_scale[...]) != 1 for layer in (model.middle, model.out))


def test_eval_leaves_the_scales_and_fixing_them_changes_no_value(model, x):
    model(x)
    model.eval()
    y, before = model(5 * x), model.up.delayed.act_scale[...]
    assert float(model.up.delayed.act_scale[...]) == float(before)
    qjax.nnx.fix_scales(model)
    assert model.up.delayed is None and model.up.kernel.get_value().scheme.spec.endswith("mode=static")
    np.testing.assert_array_equal(model(5 * x), y)


def test_training_what_lies_beside_keeps_the_history(model, x):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(6)]
    assert losses[-1] < losses[1]
    assert int(jnp.sum(model.out.delayed.amax_history[...] > 0)) == 4


def test_stacked_layers_have_a_history_each(x):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    layers = qjax.nnx.quantize(make(nnx.Rngs(0).split(3)), SCHEME)
    assert layers.delayed.amax_history[...].shape == (3, 4)
    y = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)
    assert y.shape == x.shape and len(set(map(float, layers.delayed.act_scale[...]))) == 3


def test_an_embedding_that_is_also_the_head_delays_the_query_only(x):
    table = qjax.nnx.quantize(nnx.Embed(20, 16, rngs=nnx.Rngs(0)), {"": SCHEME})
    table(jnp.arange(3))
    assert float(table.delayed.amax_history[...].max()) == 0
    table.attend(x)
    assert float(table.delayed.amax_history[...][0]) == float(jnp.abs(x).max())


def test_a_folder_has_no_place_for_a_history(tmp_path):
    llama = qjax.nnx.quantize(small_llama(hidden=32), SCHEME)
    with pytest.raises(CheckpointError, match="_proj: has a delayed scale of x.*fix_scales"):
        qjax.save(llama, tmp_path / "out", source="examples/pylm-4m")
