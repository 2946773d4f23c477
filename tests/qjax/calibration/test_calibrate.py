"""`calibrate` on small unmodified models: what it makes, in what order, and how it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
import qjax.linen
import qjax.nnx
from qjax.calibration import AWQ, GPTQ, HQQ, MSE, SmoothQuant
from qjax.calibration.layer import Layer, quantize_layer
from qjax.calibration.moments import add, measure
from qjax.errors import CalibrationError
from qjax.models.llama import RMSNorm

SCHEME = "w4a16:group_size=16,symmetric=false"


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="up")(x)
        return nn.Dense(16, name="down")(nn.relu(x))


@pytest.fixture(scope="module")
def mlp():
    x = jax.random.normal(jax.random.key(0), (2, 64, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
    return MLP(), MLP().init(jax.random.key(2), x[0])["params"], list(x)


def statistics(x, y=None):
    return measure(x, y, jnp.int32(0), (1,), ())


def same(one, two):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    assert one.scheme == two.scheme and all(np.array_equal(a, b) for a, b in leaves)


def test_each_layer_is_calibrated_behind_the_quantized_ones(mlp):
    model, params, batches = mlp
    found = qjax.calibrate(model, batches, GPTQ(), SCHEME, params=params)
    x = jnp.concatenate(batches)
    up = quantize_layer(Layer("up", params["up"]["kernel"], qjax.parse_scheme(SCHEME)), statistics(x), GPTQ())
    same(found["up"]["kernel"], up)
    hidden = nn.relu(x @ up.dequantize() + params["up"]["bias"])
    down = Layer("down", params["down"]["kernel"], qjax.parse_scheme(SCHEME))
    same(found["down"]["kernel"], quantize_layer(down, statistics(hidden), GPTQ()))
    assert found["down"]["kernel"].input_perm.shape == (32,)
    np.testing.assert_array_equal(found["up"]["bias"], params["up"]["bias"])


@pytest.mark.parametrize(
    "recipe",
    [GPTQ(), GPTQ(order="static", clip=False, passes=2, outputs="float"), AWQ(), AWQ(rounding="gptq")],
    ids=str,
)
def test_outputs_are_nearer_to_the_float_model_than_by_rounding_to_nearest(mlp, recipe):
    model, params, batches = mlp
    x = jnp.concatenate(batches)

    def error(quantized):
        y = qjax.linen.apply(model, {"params": quantized}, x)
        return float(jnp.mean((y - model.apply({"params": params}, x)) ** 2))

    scheme = "w3a16:group_size=16"
    assert error(qjax.calibrate(model, batches, recipe, scheme, params=params)) < 0.95 * error(
        qjax.quantize(params, scheme)
    )


def test_a_recipe_without_data_needs_no_batch(mlp):
    model, params, _ = mlp
    found = qjax.calibrate(model, None, HQQ(), SCHEME, params=params)
    w = found["up"]["kernel"]
    assert w.zero_point.dtype == np.float16 and (np.asarray(w.zero_point) % 1 != 0).any()
    kernel = np.asarray(params["up"]["kernel"])
    rounded = qjax.quantize_array(params["up"]["kernel"], SCHEME)
    errors = [np.mean(np.abs(kernel - np.asarray(a.dequantize()))) for a in (w, rounded)]
    assert errors[0] < errors[1]


def test_one_batch_or_the_same_tokens_in_two_make_the_same_sums(mlp):
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    whole, parts = statistics(x), [measure(a, None, jnp.int32(i), (1,), ()) for i, a in enumerate((x[:2], x[2:]))]
    total = add(*parts)
    np.testing.assert_allclose(total.gram, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(total.magnitude, np.abs(x).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(total.peak, whole.peak)
    assert total.tokens == 6 and total.bad == -1


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16)(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


def test_stacked_layers_are_calibrated_one_behind_the_other(mlp):
    _, _, (x, _) = mlp
    params = Stack().init(jax.random.key(0), x)["params"]
    found = qjax.calibrate(Stack(), [x], "gptq:order=static", SCHEME, params=params)["layers"]["Dense_0"]["kernel"]
    assert found.shape == (2, 16, 16)
    dense = params["layers"]["Dense_0"]
    scheme, recipe = qjax.parse_scheme(SCHEME), GPTQ(order="static")
    for i in range(2):
        want = quantize_layer(Layer("", dense["kernel"][i], scheme), statistics(x), recipe)
        same(jax.tree.map(lambda a, i=i: a[i], found), want)
        x = jnp.tanh(x @ want.dequantize() + dense["bias"][i])


class Gated(nnx.Module):
    """A norm before two layers that share its output, as in a Llama."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.norm.scale.set_value(jnp.linspace(0.5, 2, 32).at[3].set(30.0))
        self.gate, self.up = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.down = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("recipe", [AWQ(), SmoothQuant(unfolded="keep")], ids=str)
def test_factors_go_into_the_norm_before_or_into_the_layer_before(recipe):
    model, x = Gated(), jax.random.normal(jax.random.key(0), (40, 32))
    weight, bias = model.norm.scale.get_value(), jnp.linspace(-1, 1, 32)
    model.up.bias.set_value(bias)
    before = model(x)
    assert qjax.calibrate(model, [x], recipe, "w8a16:group_size=16,symmetric=false") is model
    assert model.gate.kernel.get_value().input_scale is None and model.up.kernel.get_value().input_scale is None
    assert model.down.kernel.get_value().input_scale is None
    assert not np.allclose(model.norm.scale.get_value(), weight)
    assert not np.allclose(model.up.bias.get_value(), bias)
    np.testing.assert_allclose(model(x), before, atol=0.02 * float(jnp.max(jnp.abs(before))))


def test_a_norm_that_feeds_something_else_too_is_left_alone():
    class Model(Gated):
        def __call__(self, x):
            x = self.norm(x)
            return x + self.down(nnx.silu(self.gate(x)) * self.up(x))

    model, x = Model(), jax.random.normal(jax.random.key(0), (40, 32))
    weight = model.norm.scale.get_value()
    qjax.calibrate(model, [x], AWQ(), "w4a16:group_size=16")
    np.testing.assert_array_equal(model.norm.scale.get_value(), weight)
    assert model.gate.kernel.get_value().input_scale is not None


class Normed(nn.Module):
    """A dense layer behind Flax's LayerNorm, or behind something that is nearly one."""

    kind: str = "layer_norm"

    @nn.compact
    def __call__(self, x):
        if self.kind == "layer_norm":
            x = nn.LayerNorm(name="norm")(x)
        elif self.kind == "shifted":
            x = nn.RMSNorm(name="norm")(x) + 0.5
        return nn.Dense(32, name="dense")(x)


@pytest.mark.parametrize("recipe", ["awq", "smoothquant:unfolded=keep"])
def test_the_bias_of_a_layer_norm_is_divided_with_its_weight(recipe):
    model, x = Normed(), jax.random.normal(jax.random.key(0), (40, 32))
    params = model.init(jax.random.key(1), x)["params"]
    norm = {"scale": jnp.linspace(-0.5, 2, 32).at[3].set(30.0), "bias": jnp.linspace(-1, 1, 32).at[5].set(0.0)}
    params = {**params, "norm": norm}
    want = model.apply({"params": params}, x)
    found = qjax.calibrate(model, [x], recipe, "w8a16:group_size=16,symmetric=false", params=params)
    assert found["dense"]["kernel"].input_scale is None
    factors = norm["scale"] / found["norm"]["scale"]
    assert not np.allclose(factors, 1)
    np.testing.assert_allclose(found["norm"]["bias"] * factors, norm["bias"], rtol=1e-5)
    y = qjax.linen.apply(model, {"params": found}, x)
    np.testing.assert_allclose(y, want, atol=0.02 * float(jnp.max(jnp.abs(want))))


def test_a_norm_to_whose_output_a_number_is_added_is_left_alone():
    model, x = Normed("shifted"), jax.random.normal(jax.random.key(0), (40, 32))
    params = model.init(jax.random.key(1), x)["params"]
    params = {**params, "norm": {"scale": jnp.linspace(0.5, 2, 32)}}
    found = qjax.calibrate(model, [x], "awq", "w8a16:group_size=16", params=params)
    np.testing.assert_array_equal(found["norm"]["scale"], params["norm"]["scale"])
    assert found["dense"]["kernel"].input_scale is not None


def test_smoothquant_says_where_it_did_nothing(caplog):
    for kind, said in (("layer_norm", 0), ("none", 1)):
        model, x = Normed(kind), jax.random.normal(jax.random.key(0), (40, 32))
        params = model.init(jax.random.key(1), x)["params"]
        qjax.calibrate(model, [x], "smoothquant", "w8a8_int8", params=params)
        assert caplog.text.count("smoothquant did nothing") == said


def test_smoothquant_is_worth_it_where_x_has_outliers():
    x = jax.random.normal(jax.random.key(0), (64, 32))
    model = Gated()
    want = model(x)
    errors = []
    for smooth in (False, True):
        model = Gated()
        if smooth:
            qjax.calibrate(model, [x], "smoothquant", "w8a8_int8")
        else:
            qjax.nnx.quantize(model, "w8a8_int8")
        errors.append(float(jnp.mean((model(x) - want) ** 2)))
    assert errors[1] < 0.5 * errors[0]


def test_an_unreached_layer_is_named():
    class Model(nnx.Module):
        def __init__(self):
            self.used, self.idle = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.used(x)

    model = Model()
    with pytest.raises(CalibrationError, match="idle/kernel: no batch reaches"):
        qjax.calibrate(model, [jnp.ones((4, 16))], "gptq", SCHEME)
    assert type(model.used) is nnx.Linear
    qjax.calibrate(model, [jnp.ones((4, 16))], "gptq", {"used": SCHEME})
    assert type(model.idle) is nnx.Linear


def test_an_unreached_layer_of_a_linen_model_is_named_and_convolutions_are_none():
    class Model(nn.Module):
        idle: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (1,), name="mix")(x)
            spare = nn.Dense(16, name="spare")
            x = nn.Dense(16, name="used")(x)
            return x if self.idle else spare(x)

    x = jnp.ones((4, 16))
    params = Model(idle=False).init(jax.random.key(0), x)["params"]
    with pytest.raises(CalibrationError, match="spare/kernel: no batch reaches this layer"):
        qjax.calibrate(Model(idle=True), [x], "gptq", SCHEME, params=params)
    found = qjax.calibrate(Model(idle=True), [x], "gptq", {"spare": None, ".*": SCHEME}, params=params)
    assert isinstance(found["used"]["kernel"], qjax.QTensor) and found["spare"]["kernel"] is params["spare"]["kernel"]


def test_a_nan_is_an_error_that_names_layer_and_batch_and_changes_nothing(mlp):
    model, params, batches = mlp
    bad = batches[1].at[3, 2].set(jnp.nan)
    with pytest.raises(CalibrationError, match="up/kernel: batch 1 brings NaN or inf"):
        qjax.calibrate(model, [batches[0], bad], "gptq", SCHEME, params=params)


@pytest.mark.parametrize(
    ("batches", "recipe", "scheme", "message"),
    [
        ([], "gptq", SCHEME, "at least one batch"),
        ([jnp.ones((4, 16)), jnp.ones((3, 16))], "gptq", SCHEME, r"batch 1 has .*\(3, 16\)"),
        ([jnp.ones((4, 16))], "gptq", "nf4", "up/kernel: recipe gptq makes integers .* got scheme nf4"),
        (None, "hqq", "w4a16:group_size=16", "add symmetric=false"),
        ([jnp.ones((4, 16))], "gtpq", SCHEME, "unknown recipe 'gtpq'; known: nearest, mse, gptq"),
        ([jnp.ones((4, 16))], "gptq:order=rising", SCHEME, "order='rising'; allowed: act, static, natural"),
        ([jnp.ones((4, 16))], "gptq:clip=1", SCHEME, "clip=1; allowed: True, False"),
        ([jnp.ones((4, 16))], "gptq:damping=2", SCHEME, "damping=2; allowed: a number from 0 to 1"),
        ([jnp.ones((4, 16))], "gptq:passes=-1", SCHEME, "passes=-1"),
        ([jnp.ones((4, 16))], GPTQ, SCHEME, "call it"),
    ],
)
def test_what_cannot_be_is_refused(mlp, batches, recipe, scheme, message):
    model, params, _ = mlp
    with pytest.raises(CalibrationError, match=message):
        qjax.calibrate(model, batches, recipe, scheme, params=params)


def test_the_devices_hold_no_less_than_nothing(mlp):
    model, params, batches = mlp
    with pytest.raises(CalibrationError, match="device_bytes=-1; allowed: 0 or more"):
        qjax.calibrate(model, batches, "gptq", SCHEME, params=params, device_bytes=-1)


def test_a_recipe_is_its_string():
    for recipe in (GPTQ(order="static", passes=3, damping=0.05), AWQ(unfolded="skip"), SmoothQuant(0.75), HQQ(), MSE()):
        assert qjax.calibration.parse_recipe(str(recipe)) == recipe
    assert str(GPTQ(clip=False, outputs="float")) == "gptq:clip=false,outputs=float"


def test_a_params_tree_has_to_come_with_a_linen_model(mlp):
    model, _, batches = mlp
    with pytest.raises(CalibrationError, match="give params="):
        qjax.calibrate(model, batches, "gptq", SCHEME)
    with pytest.raises(CalibrationError, match="for a linen module"):
        qjax.calibrate(Gated(), batches, "gptq", SCHEME, params={})


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norms_of_a_llama_take_factors_up(offset):
    class Model(nnx.Module):
        def __init__(self):
            self.norm = RMSNorm(32, epsilon=1e-6, offset=offset, param_dtype=jnp.float32)
            self.norm.weight.set_value(jnp.linspace(-0.5, 2, 32) - offset)
            self.dense = nnx.Linear(32, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(self.norm(x))

    model, x = Model(), jax.random.normal(jax.random.key(0), (40, 32))
    before, weight = model(x), model.norm.weight.get_value()
    qjax.calibrate(model, [x], "awq", "w8a16:group_size=16")
    assert model.dense.kernel.get_value().input_scale is None
    assert not np.allclose(model.norm.weight.get_value(), weight)
    np.testing.assert_allclose(model(x), before, atol=0.02 * float(jnp.max(jnp.abs(before))))


@pytest.mark.slow
def test_batches_and_kernels_that_are_cut_over_a_mesh_give_the_same_weights(mlp):
    model, params, batches = mlp
    recipe = GPTQ(order="static", clip=True, passes=1, outputs="float")
    alone = qjax.calibrate(model, batches, recipe, SCHEME, params=params)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = (NamedSharding(mesh, P(*spec)) for spec in (("model", None), (None, "model")))
    cut = jax.device_put(params, {"up": {"kernel": columns, "bias": None}, "down": {"kernel": rows, "bias": None}})
    batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]
    found = qjax.calibrate(model, batches, recipe, SCHEME, params=cut)
    for name, spec in (("up", ("model",)), ("down", (None, "model"))):
        w = found[name]["kernel"]
        assert w.packed.sharding.spec[: len(spec)] == spec
        np.testing.assert_allclose(w.dequantize(), alone[name]["kernel"].dequantize(), atol=1e-6)
