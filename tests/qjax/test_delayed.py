"""Delayed scales: the history, call by call, beside Transformer Engine's recipe in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax
from qjax.delayed import AmaxHistory, fixed, observe, start
from qjax.errors import QTensorError, SchemeError
from qjax.scheme_json import scheme_from_dict, scheme_to_dict

FP8_MAX = np.float32(448)


def weight(options: str = "", stack: tuple[int, ...] = ()) -> qjax.QTensor:
    kernel = jax.random.normal(jax.random.key(0), (*stack, 32, 8))
    return qjax.quantize_array(kernel, f"w8a8_fp8:mode=delayed{options}")


def transformer_engine(magnitudes: list[float], length: int, margin: int, algorithm: str) -> list[np.float32]:
    """The factors by which its calls multiply x: amax into slot 0, a factor from all slots, then the roll."""
    history, factor, found = np.zeros(length, np.float32), np.float32(1), []
    for magnitude in magnitudes:
        found.append(factor)
        history[0] = magnitude
        amax = history.max() if algorithm == "max" else history[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            new = (FP8_MAX / amax) / np.float32(2.0**margin)
        factor = new if amax > 0 and np.isfinite(amax) else factor
        history = np.roll(history, -1)
        history[0] = 0
    return found


MAGNITUDES = [3.0, 0.0, 100.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, np.inf, 5.0, 4.0, 3.0, 2.0, 1.0, 9.0]


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("length", [1, 4])
def test_scales_are_those_of_transformer_engine(length, margin, algorithm):
    w = weight(f",history={length},margin={margin},amax={algorithm}")
    step = jax.jit(observe)
    seen, scales = start(w), []
    for magnitude in MAGNITUDES:
        scales.append(seen.scale)
        seen = step(seen, jnp.asarray([[-magnitude, magnitude / 2]], jnp.bfloat16), w)
    wanted = transformer_engine(MAGNITUDES, length, margin, algorithm)
    np.testing.assert_allclose(np.array(scales), 1 / np.array(wanted), rtol=1e-6)
    assert seen.amax.shape == (length,) and float(seen.amax[0]) == 9


def test_a_magnitude_too_small_for_a_scale_gives_the_smallest():
    w = weight(",history=2")
    seen = observe(start(w), jnp.full((2, 32), 2e-38), w)
    assert float(seen.scale) == np.finfo(np.float32).tiny


def test_a_product_takes_the_scale_of_the_calls_before_and_saturates_beyond_it():
    w, x = weight(), jnp.linspace(-2, 2, 64).reshape(2, 32)
    seen = observe(start(w), x / 4, w)
    codes = np.clip(np.asarray(x) / np.float32(0.5 / 448), -448, 448).astype(jnp.float8_e4m3fn)
    wanted = codes.astype(np.float64) * (0.5 / 448) @ np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(qjax.matmul(x, fixed(w, seen.scale)), wanted, rtol=1e-5, atol=1e-5)


def test_a_calibrated_scale_is_where_it_starts():
    assert float(start(weight()).scale) == 1
    assert float(start(dataclasses.replace(weight(), act_scale=jnp.float32(0.25))).scale) == 0.25


def test_stacked_weights_remember_one_x():
    w = weight(",history=3", stack=(2,))
    seen = observe(start(w), jnp.full((2, 5, 32), -6.0), w)
    np.testing.assert_array_equal(seen.amax, [[6, 0, 0]] * 2)
    np.testing.assert_allclose(seen.scale, [6 / 448] * 2, rtol=1e-6)


def test_devices_of_a_shard_map_agree_on_the_largest():
    w = weight(",history=2")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.arange(64.0).reshape(8, 8)
    one = jax.shard_map(lambda x: observe(start(w), x, w), mesh=mesh, in_specs=P("data"), out_specs=P())
    np.testing.assert_array_equal(jax.jit(one)(x).amax, [63, 0])


def test_no_gradient_flows_into_the_history():
    w, x = weight(), jnp.ones((2, 32))

    def loss(x):
        first = observe(start(w), x, w)
        return jnp.sum(qjax.matmul(x, fixed(w, first.scale)))

    np.testing.assert_allclose(jax.grad(loss)(x), jnp.broadcast_to(w.dequantize().sum(1), x.shape), rtol=1e-5)


def test_a_scheme_is_its_string_and_its_record():
    scheme = qjax.W8A8FP8(mode="delayed", history=16, margin=1, amax="most_recent")
    assert str(scheme) == "w8a8_fp8:activation=tensor,mode=delayed,history=16,margin=1,amax=most_recent"
    assert qjax.parse_scheme(str(scheme)) == scheme == scheme_from_dict(scheme_to_dict(scheme))
    assert str(fixed(weight(",history=16"), jnp.float32(1)).scheme) == "w8a8_fp8:activation=tensor,mode=static"


@pytest.mark.parametrize(
    "options",
    [
        dict(mode="delayed", history=0),
        dict(mode="delayed", margin=0.5),
        dict(mode="delayed", amax="min"),
        dict(margin=1),
    ],
    ids=str,
)
def test_what_is_no_delayed_scaling_is_refused(options):
    with pytest.raises(SchemeError, match=list(options)[-1]):
        qjax.W8A8FP8(**options)


def test_a_record_of_another_history_is_refused():
    record = scheme_to_dict(qjax.W8A8FP8(mode="delayed"))
    record["activation"]["delayed"]["history"] = 0
    with pytest.raises(SchemeError, match="activation"):
        scheme_from_dict(record)


def test_factors_of_x_and_a_delayed_scale_exclude_each_other():
    w = dataclasses.replace(weight(), input_scale=jnp.ones(32))
    with pytest.raises(QTensorError, match="input_scale"):
        observe(AmaxHistory(jnp.zeros(4), jnp.float32(1)), jnp.ones((2, 32)), w)
