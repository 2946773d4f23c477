"""Static scales of x: their definitions in NumPy, and what `calibrate` writes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.calibration.act_scale import BINS, LOWEST, OCTAVE, histogram, static_scale
from qjax.errors import CalibrationError
from qjax.schemes import Activation

BIN = 2 ** (1 / OCTAVE)
INT8, E4M3 = Activation("int8", "tensor", "static"), Activation("e4m3", "tensor", "static")


@pytest.fixture(scope="module")
def x():
    """A thousand tokens with heavy tails."""
    return np.random.default_rng(0).standard_t(3, (1000, 64)).astype(np.float32)


def scale_of(x, activation, how):
    return float(static_scale(jnp.max(jnp.abs(x), axis=0), histogram(jnp.asarray(x)), activation, how))


def test_magnitudes_are_counted_in_bins_of_equal_ratio(x):
    counts = np.asarray(histogram(jnp.stack([x, 0 * x])))
    assert counts.shape == (2, BINS) and counts.sum(axis=-1).tolist() == [x.size, x.size]
    assert counts[1, 0] == x.size
    edges = 2.0 ** (np.arange(BINS + 1) / OCTAVE + LOWEST)
    wanted, _ = np.histogram(np.abs(x), edges)
    assert np.abs(np.cumsum(counts[0].astype(int)) - np.cumsum(wanted)).max() <= 2  # float32 rounds at the edges


@pytest.mark.parametrize(("activation", "most"), [(INT8, 127), (E4M3, 448)], ids=["int8", "e4m3"])
def test_max_is_the_largest_and_a_percentile_leaves_the_rest_out(x, activation, most):
    assert scale_of(x, activation, "max") == pytest.approx(np.abs(x).max() / most)
    assert scale_of(x, activation, 100.0) == pytest.approx(np.abs(x).max() / most)
    for percentile in (50.0, 99.0, 99.9):
        ratio = scale_of(x, activation, percentile) * most / np.percentile(np.abs(x), percentile)
        assert 1 / BIN < ratio < BIN**1.01


def rounded(x, scale, activation):
    if activation is INT8:
        return np.clip(np.round(x / scale), -128, 127) * scale
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("activation", [INT8, E4M3], ids=["int8", "e4m3"])
def test_mse_is_as_good_as_the_best_range_that_is_tried_one_by_one(x, activation):
    def error(scale):
        return float(((x - rounded(x, scale, activation)) ** 2).sum())

    most = scale_of(x, activation, "max")
    best = min(error(most * 2 ** (-i / 64)) for i in range(384))
    assert error(scale_of(x, activation, "mse")) < 1.03 * best
    if activation is INT8:
        assert best < 0.9 * error(most)


def test_an_input_that_is_always_zero_has_scale_one(x):
    for how in ("max", "mse", 99.0):
        assert scale_of(0 * x, INT8, how) == 1


class MLP(nnx.Module):
    def __init__(self):
        self.up, self.down = (nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.parametrize("how", ["max", "mse", 99.5])
def test_calibrate_writes_what_was_seen_behind_quantized_layers(x, how):
    batches = list(x.reshape(4, 250, 64))
    model = qjax.calibrate(MLP(), batches, "nearest", "w8a8_int8:mode=static", act_scale=how)
    wide = MLP()
    kernel = qjax.quantize_array(wide.up.kernel.get_value(), "w8a8_int8:mode=static")
    assert np.array_equal(model.up.kernel.get_value().packed, kernel.packed)
    hidden = np.tanh(x @ kernel.dequantize() + wide.up.bias.get_value())
    scales = [layer.kernel.get_value().act_scale for layer in (model.up, model.down)]
    assert [a.shape for a in scales] == [(), ()]
    assert list(map(float, scales)) == pytest.approx([scale_of(a, INT8, how) for a in (x, hidden)], rel=1e-5)
    y, exact = model(x), wide(x)
    assert float(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2)) < 3e-2


def test_other_recipes_write_it_too_and_smoothquant_that_of_the_smoothed_input(x):
    gptq = qjax.calibrate(MLP(), [x], "gptq", "w8a8_int8:mode=static")
    assert float(gptq.up.kernel.get_value().act_scale) == pytest.approx(np.abs(x).max() / 127)
    smooth = qjax.calibrate(MLP(), [x], "smoothquant:unfolded=keep", "w8a8_int8:mode=static").up.kernel.get_value()
    assert float(smooth.act_scale) == pytest.approx(np.abs(x * smooth.input_scale).max() / 127, rel=1e-5)


def test_layers_that_are_stacked_have_a_scale_each(x):
    class Stacked(nnx.Module):
        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.layers = nnx.vmap(lambda key: nnx.Linear(64, 64, rngs=nnx.Rngs(key)))(keys)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    for how in ("max", "mse"):
        model = qjax.calibrate(Stacked(), [x], "nearest", "w8a8_int8:mode=static", act_scale=how)
        scales = model.layers.kernel.get_value().act_scale
        assert scales.shape == (3,) and len(set(scales.tolist())) == 3
        assert float(scales[0]) == pytest.approx(scale_of(x, INT8, how))


@pytest.mark.parametrize(
    ("batches", "recipe", "how", "message"),
    [
        (1, "nearest", "most", "act_scale='most'; allowed: 'max', 'mse', or a percentile"),
        (1, "nearest", 0, "act_scale=0"),
        (1, "nearest", 101.0, "act_scale=101.0"),
        (1, "nearest", True, "act_scale=True"),
        (1, "smoothquant", "mse", "recipe smoothquant scales columns of x"),
        (0, "nearest", "max", "scheme w8a8_int8:.* looks at what enters layers: give at least one batch"),
    ],
)
def test_what_cannot_be_made_is_refused(x, batches, recipe, how, message):
    with pytest.raises(CalibrationError, match=message):
        qjax.calibrate(MLP(), [x] * batches, recipe, "w8a8_int8:mode=static", act_scale=how)
