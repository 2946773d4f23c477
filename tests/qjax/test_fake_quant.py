"""Training through rounding: what is seen is what quantizing gives, to the bit, and gradients pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qjax
import qjax.linen
import qjax.nnx
from qjax.errors import QuantizeError, RuleError


@pytest.mark.parametrize("scheme", ["w3a16:group_size=16", "w4a16", "nf4", "mxfp4", "nvfp4", "fp8", "w8a16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_jitted_step_sees_the_values_of_the_quantized_kernel(scheme, dtype):
    kernel = jax.random.normal(jax.random.key(0), (128, 24)).astype(dtype)
    seen = jax.jit(lambda w: qjax.fake_quant(w, scheme))(kernel)
    np.testing.assert_array_equal(seen, qjax.quantize_array(kernel, scheme).dequantize())
    assert seen.dtype == dtype and not np.array_equal(seen, kernel)


def test_gradients_pass_as_if_nothing_were_rounded():
    kernel, x = jax.random.normal(jax.random.key(0), (32, 8)), jax.random.normal(jax.random.key(1), (5, 32))
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(x @ qjax.fake_quant(w, "w3a16:group_size=16"))))(kernel)
    at = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(qjax.fake_quant(kernel, "w3a16:group_size=16"))
    np.testing.assert_allclose(gradient, at, rtol=1e-5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(16, name="dense")(nn.LayerNorm()(x))


def test_a_linen_model_trained_so_is_the_model_that_quantize_makes():
    model, scheme = Model(), "w3a16:group_size=16"
    x, y = jax.random.normal(jax.random.key(0), (4, 6, 32)), jax.random.normal(jax.random.key(1), (4, 6, 16))
    params = model.init(jax.random.key(2), x)["params"]
    optimizer = optax.adam(1e-2)

    def apply(params):
        return model.apply({"params": qjax.fake_quantize(params, scheme, model=model, inputs=(x,))}, x)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((apply(p) - y) ** 2))(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    def rounded_loss(params):
        quantized = qjax.quantize(params, scheme, model=model, inputs=(x,))
        return float(jnp.mean((qjax.linen.apply(model, {"params": quantized}, x) - y) ** 2))

    before, state = rounded_loss(params), optimizer.init(params)
    for _ in range(40):
        params, state, _ = step(params, state)
    assert rounded_loss(params) < 0.7 * before
    seen = jax.jit(lambda p: qjax.fake_quantize(p, scheme, model=model, inputs=(x,)))(params)
    quantized = qjax.quantize(params, scheme, model=model, inputs=(x,))
    for name in ("query", "out"):
        kernel = quantized["attention"][name]["kernel"]
        np.testing.assert_array_equal(seen["attention"][name]["kernel"], kernel.dequantize())
    np.testing.assert_array_equal(seen["LayerNorm_0"]["scale"], params["LayerNorm_0"]["scale"])


def test_an_nnx_model_trained_so_is_the_model_that_quantize_makes():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    model, scheme = MLP(nnx.Rngs(0)), "w3a16:group_size=16"
    x, y = jax.random.normal(jax.random.key(0), (64, 32)), jax.random.normal(jax.random.key(1), (64, 8))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((qjax.nnx.fake_quantize(model, scheme)(x) - y) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    seen = qjax.nnx.fake_quantize(model, scheme)
    assert type(model.up) is type(seen.up) is nnx.Linear and seen.up is not model.up
    qjax.nnx.quantize(model, scheme)
    np.testing.assert_array_equal(seen.up.kernel.get_value(), model.up.kernel.get_value().dequantize())
    np.testing.assert_allclose(seen(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_box_stays_around_its_kernel():
    layer = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    params = layer.init(jax.random.key(0), jnp.ones((2, 16)))["params"]
    kernel = qjax.fake_quantize(params, "w8a16")["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == ("in", "out")


def test_a_wrong_group_or_rule_is_named():
    with pytest.raises(QuantizeError, match="up: group_size=96 does not divide K=64"):
        qjax.fake_quant(jnp.ones((64, 8)), "w4a16:group_size=96", where="up")
    with pytest.raises(RuleError, match="matches nothing"):
        qjax.fake_quantize({"up": {"kernel": jnp.ones((64, 8))}}, {"down": "w4a16"})
