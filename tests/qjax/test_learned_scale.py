"""Learned scales: gradients by the paper's formula, and codes that are those which training saw, bit for bit."""

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
from qjax.dequantize import codes
from qjax.errors import QuantizeError

SCHEME = "w3a16:group_size=16,symmetric=true"


def reference(w, s, g, bits, group):
    """LSQ of a row of weights `[K]`, scales `[K / group]`, gradient `[K]`: value, gradients of w and s, in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio = w / np.repeat(s, group)
    q = np.round(np.clip(ratio, low, high))
    inside = (ratio > low) & (ratio < high)
    of_s = (g * np.where(inside, q - ratio, q)).reshape(-1, group).sum(1) / np.sqrt(group * high)
    return q * np.repeat(s, group), g * inside, of_s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_and_gradients_are_those_of_the_paper(bits):
    keys = jax.random.split(jax.random.key(bits), 3)
    w, g = jax.random.normal(keys[0], (48, 5)), jax.random.normal(keys[1], (48, 5))
    s = jax.random.uniform(keys[2], (5, 3), minval=0.5, maxval=3) / 2 ** (bits - 1)
    scheme = f"w{bits}a16:group_size=16,symmetric=true,scale_dtype=float32"
    value, back = jax.vjp(jax.jit(lambda w, s: qjax.fake_quant(w, scheme, scale=s)), w, s)
    of_w, of_s = back(g)
    for n in range(5):
        wanted = reference(*(np.asarray(a, np.float64) for a in (w[:, n], s[n], g[:, n])), bits, 16)
        for got, want in zip((value[:, n], of_w[:, n], of_s[n]), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_scales_of_channels_and_of_heads_that_are_stacked_have_their_gradients():
    w, g = jax.random.normal(jax.random.key(0), (2, 8, 3, 4)), jax.random.normal(jax.random.key(1), (2, 8, 3, 4))
    s = jax.random.uniform(jax.random.key(2), (2, 4, 1), minval=0.05, maxval=0.5)
    use = dict(contracted=(1, 2), stacked=(0,))
    _, back = jax.vjp(lambda w, s: qjax.fake_quant(w, "w4a16:group_size=-1", scale=s, **use), w, s)
    of_w, of_s = back(g)
    for layer in range(2):
        for n in range(4):
            row = (np.asarray(a, np.float64)[layer, :, :, n].ravel() for a in (w, g))
            _, want_w, want_s = reference(next(row), np.asarray(s[layer, n], np.float64), next(row), 4, 24)
            np.testing.assert_allclose(of_w[layer, :, :, n].ravel(), want_w, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(of_s[layer, n], want_s, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(16, name="dense")(nn.LayerNorm()(x))


def bits_of(kernel, w):
    """The codes that values of a kernel have on the grid of a quantized one, by its own scales."""
    rows = np.asarray(kernel, np.float64).reshape(w.in_features, w.out_features).T
    return np.round(rows / np.repeat(np.asarray(w.scale, np.float64), rows.shape[1] // w.scale.shape[1], 1))


def test_a_linen_model_trained_so_converts_to_the_codes_that_training_saw():
    model = Model()
    x, y = jax.random.normal(jax.random.key(0), (4, 6, 32)), jax.random.normal(jax.random.key(1), (4, 6, 16))
    params = model.init(jax.random.key(2), x)["params"]
    asked = dict(model=model, inputs=(x,))
    scales = qjax.scales_of(qjax.quantize(params, SCHEME, **asked))
    optimizer = optax.adam(1e-2)

    def loss(trained):
        seen = qjax.fake_quantize(trained["params"], SCHEME, scales=trained["scales"], **asked)
        return jnp.mean((model.apply({"params": seen}, x) - y) ** 2)

    @jax.jit
    def step(trained, state):
        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state, value

    trained = {"params": params, "scales": scales}
    state, losses = optimizer.init(trained), []
    for _ in range(30):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert all(not np.array_equal(trained["scales"][path], scale) for path, scale in scales.items())
    seen = jax.jit(lambda t: qjax.fake_quantize(t["params"], SCHEME, scales=t["scales"], **asked))(trained)
    quantized = qjax.quantize(trained["params"], SCHEME, scales=trained["scales"], **asked)
    for layer in ("query", "out"):
        kernel, w = seen["attention"][layer]["kernel"], quantized["attention"][layer]["kernel"]
        np.testing.assert_array_equal(kernel, w.dequantize())
        np.testing.assert_array_equal(bits_of(kernel, w) + 4, codes(w))


def test_an_nnx_model_begins_from_scales_of_a_recipe_and_converts_too():
    model = nnx.Sequential(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    x, y = jax.random.normal(jax.random.key(0), (64, 32)), jax.random.normal(jax.random.key(1), (64, 8))
    scales = qjax.nnx.scales_of(qjax.calibrate(nnx.clone(model), None, "mse", SCHEME))
    assert scales.keys() == {"layers/0/kernel", "layers/2/kernel"}

    def loss(model, scales):
        return jnp.mean((qjax.nnx.fake_quantize(model, SCHEME, scales=scales)(x) - y) ** 2)

    (of_model, of_scales), before = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, scales), loss(model, scales)
    nnx.update(model, jax.tree.map(lambda a, g: a - 0.1 * g, nnx.state(model, nnx.Param), of_model))
    scales = jax.tree.map(lambda a, g: a - 0.1 * g, scales, of_scales)
    assert loss(model, scales) < before
    seen = qjax.nnx.fake_quantize(model, SCHEME, scales=scales)
    quantized = qjax.nnx.quantize(nnx.clone(model), SCHEME, scales=scales)
    for layer in (0, 2):
        w = quantized.layers[layer].kernel.get_value()
        np.testing.assert_array_equal(seen.layers[layer].kernel, w.dequantize())
        np.testing.assert_array_equal(bits_of(seen.layers[layer].kernel, w) + 4, codes(w))


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (SCHEME, (8, 3), r"scale of shape \(8, 3\); w3a16.* asks for \(8, 2\)"),
        ("w4a16:group_size=16,symmetric=false", (8, 2), "symmetric integers"),
        ("nf4:block_size=16", (8, 2), "symmetric integers"),
    ],
)
def test_scales_that_have_no_place_are_refused(scheme, shape, message):
    with pytest.raises(QuantizeError, match=message):
        qjax.fake_quant(jnp.ones((32, 8)), scheme, scale=jnp.ones(shape))


def test_scales_of_other_kernels_and_of_other_weights_are_refused():
    params = {"up": {"kernel": jnp.ones((32, 8))}}
    for make in (qjax.quantize, qjax.fake_quantize):
        with pytest.raises(QuantizeError, match="scales of down/kernel: no such kernel"):
            make(params, SCHEME, scales={"down/kernel": jnp.ones((8, 2))})
    with pytest.raises(QuantizeError, match="nothing is quantized"):
        qjax.scales_of(params)
    with pytest.raises(QuantizeError, match="up/kernel: .* no weight of symmetric integers"):
        qjax.scales_of(qjax.quantize(params, "w3a16:group_size=16"))
