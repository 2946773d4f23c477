"""Delayed scales in linen: a history for each layer in its collection, under Flax's own transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
import qjax.linen
from qjax.errors import QTensorError

SCHEME = "w8a8_fp8:mode=delayed,history=4"
MUTABLE = ["delayed_scaling"]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, name="up")(x))
        return nn.Einsum((32, 2, 8), "bh,hnd->bnd", name="down")(x)


@pytest.fixture(scope="module")
def mlp():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    params = MLP().init(jax.random.key(1), x)["params"]
    return MLP(), qjax.quantize(params, SCHEME, model=MLP(), inputs=(x,)), x


@jax.jit
def call(variables, x):
    return qjax.linen.apply(MLP(), variables, x, mutable=MUTABLE)


def test_an_unmodified_model_keeps_a_history_for_each_layer(mlp):
    _, params, x = mlp
    variables = {"params": params}
    for factor in (1, 3, 2):
        _, seen = call(variables, factor * x)
        variables |= seen
    up = variables["delayed_scaling"]["up"]
    largest = float(jnp.abs(x).max())
    np.testing.assert_allclose(up["amax_history"], [2 * largest, 3 * largest, largest, 0], rtol=1e-6)
    np.testing.assert_allclose(up["act_scale"], 3 * largest / 448, rtol=1e-6)
    assert variables["delayed_scaling"]["down"]["act_scale"] > 0


def test_without_mutable_the_scale_stays_and_equals_that_of_the_static_scheme(mlp):
    model, params, x = mlp
    variables = {"params": params} | call({"params": params}, x)[1]
    y = qjax.linen.apply(model, variables, 2 * x)
    static = qjax.linen.fix_scales(variables)
    assert static.keys() == {"params"} and static["params"]["up"]["kernel"].scheme.spec.endswith("mode=static")
    np.testing.assert_array_equal(qjax.linen.apply(model, static, 2 * x), y)


def test_a_model_without_a_history_is_told_how_to_get_one(mlp):
    model, params, x = mlp
    with pytest.raises(QTensorError, match=r"up: .* mutable=\['delayed_scaling'\]"):
        qjax.linen.apply(model, {"params": params}, x)


def test_our_own_layers_begin_with_init_and_train_with_their_biases(mlp):
    _, _, x = mlp
    layer = qjax.linen.QDense(8, scheme=SCHEME)
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["delayed_scaling"]["amax_history"], np.zeros(4))

    def loss(bias, variables):
        params = {**variables["params"], "bias": bias}
        y, seen = layer.apply({**variables, "params": params}, x, mutable=MUTABLE)
        return jnp.mean((y - 1) ** 2), seen

    bias, history, losses = variables["params"]["bias"], variables, []
    for _ in range(5):
        (value, seen), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(bias, history)
        bias, history = optax.apply_updates(bias, -0.5 * gradient), {**history, **seen}
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert int(jnp.sum(history["delayed_scaling"]["amax_history"] > 0)) == 4


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16)(x), None


def test_layers_under_scan_and_remat_have_a_history_each(mlp):
    *_, x = mlp
    axes = {"params": 0, "delayed_scaling": 0}
    stack = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), x, None)["params"]
    params = qjax.quantize(params, SCHEME, model=stack, inputs=(x, None))
    _, seen = qjax.linen.apply(stack, {"params": params}, x, None, mutable=MUTABLE)
    (history,) = seen["delayed_scaling"].values()
    assert history["amax_history"].shape == (3, 4) and len(set(map(float, history["act_scale"]))) == 3
    static = qjax.linen.fix_scales({"params": params} | seen)
    y, _ = qjax.linen.apply(stack, static, x, None)
    np.testing.assert_array_equal(y, qjax.linen.apply(stack, {"params": params} | seen, x, None)[0])
