"""`search` on small unmodified models: what it measures, what it chooses, and how it refuses."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.linen
import qjax.nnx
from qjax.errors import CalibrationError, QuantizeError, RuleError

CANDIDATES = ["w2a16:group_size=16", "w4a16:group_size=16", "w8a16"]
WIDTH = 128


class Tiny(nnx.Module):
    """A language model: a look-up, two layers of which the second hardly matters, a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(24, WIDTH, rngs=rngs)
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 24, rngs=rngs)

    def __call__(self, ids):
        x = jnp.tanh(self.first(4 * self.embed(ids)))
        return self.head(4 * (x + 0.1 * self.second(x)))


@pytest.fixture(scope="module")
def batches():
    return list(np.random.default_rng(0).integers(0, 24, (2, 4, 16), np.int32))


@pytest.fixture(scope="module")
def found(batches):
    return qjax.search(Tiny(), batches, budget_bits=6, candidates=CANDIDATES)


def kl(base, model, ids):
    theirs, ours = (jax.nn.log_softmax(one(ids)) for one in (base, model))
    return float(jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)))


def test_errors_are_those_of_outputs_and_slopes_what_the_model_loses_by_them(found, batches):
    base = Tiny()
    ids = np.concatenate(batches)
    x = 4 * base.embed(ids)
    inputs = {"first": x, "second": jnp.tanh(base.first(x))}
    assert [layer.path for layer in found.layers] == ["first", "second"]
    for layer in found.layers:
        weight = getattr(base, layer.path).kernel.get_value()
        for option, candidate in zip(layer.options, CANDIDATES, strict=True):
            w = qjax.quantize_array(weight, candidate)
            lost = inputs[layer.path].reshape(-1, WIDTH) @ (w.dequantize() - weight)
            assert option.scheme == qjax.parse_scheme(candidate) and option.nbytes == w.nbytes
            assert option.error == pytest.approx(float(jnp.mean(jnp.sum(lost**2, axis=-1))), rel=1e-3)
            assert option.loss == pytest.approx(layer.slope * option.error)
        alone = qjax.nnx.quantize(Tiny(), [(layer.path, CANDIDATES[0])])
        assert layer.options[0].loss == pytest.approx(kl(base, alone, ids), rel=1e-3)
    first, second = found.layers
    assert first.slope > 10 * second.slope


def test_the_layer_that_matters_gets_the_bits_and_the_rules_do_what_was_found(found, batches):
    schemes = [str(one.scheme) for one in found.choice]
    assert schemes[0] == "w8a16" and schemes[1] != "w8a16" and found.bits <= 6
    model = qjax.nnx.quantize(Tiny(), found.rules)
    kernels = [layer.kernel.get_value() for layer in (model.first, model.second)]
    assert [str(w.scheme) for w in kernels] == schemes
    assert sum(w.nbytes for w in kernels) == found.nbytes == found.point.nbytes
    assert qjax.rules.parse_rules(found.text, "text") == found.rules
    assert kl(Tiny(), model, batches[0]) < kl(Tiny(), qjax.nnx.quantize(Tiny(), CANDIDATES[1]), batches[0])


def test_another_budget_needs_no_new_measurement(found):
    uniform = {point.name: point for point in found.uniform()}
    assert list(uniform) == CANDIDATES
    most = found.within(nbytes=uniform["w8a16"].nbytes)
    assert {str(one.scheme) for one in most.choice} == {"w8a16"} and most.budget != found.budget
    least = found.within(bits=uniform[CANDIDATES[0]].bits)
    assert {str(one.scheme) for one in least.choice} == {CANDIDATES[0]}
    front = found.front()
    assert (front[0].nbytes, front[-1].nbytes) == (least.nbytes, most.nbytes)
    for point in uniform.values():
        bound = np.interp(point.nbytes, [p.nbytes for p in front], [p.loss for p in front])
        assert point.loss >= bound * (1 - 1e-9)


def test_layers_that_go_together_share_a_scheme(batches):
    found = qjax.search(Tiny(), batches, budget_bits=6, candidates=CANDIDATES, together=["first|second"])
    assert len(set(one.scheme for one in found.choice)) == 1 and found.bits <= 6
    assert {str(one.scheme) for one in found.choice} == {CANDIDATES[1]}


def test_a_layer_may_stay_float_and_what_does_not_fit_it_is_no_option(batches):
    found = qjax.search(
        Tiny(), batches, budget_bytes=2**20, candidates=[None, "w4a16:group_size=16", "w4a16:group_size=96"]
    )
    assert [len(layer.options) for layer in found.layers] == [2, 2]
    assert found.text == "first none\nsecond none\n" and found.point.loss == 0
    with pytest.raises(RuleError):
        qjax.nnx.quantize(Tiny(), [*found.rules, ("third", "w8a16")])


def test_a_recipe_is_tried_as_it_will_be_used(batches):
    near, gptq = (
        qjax.search(Tiny(), batches, budget_bits=5, candidates=CANDIDATES[:2], recipe=recipe)
        for recipe in (None, "gptq")
    )
    for one, other in zip(near.layers, gptq.layers, strict=True):
        assert all(b.error < a.error for a, b in zip(one.options, other.options, strict=True))
    qjax.calibrate(Tiny(), batches, "gptq", gptq.rules)


class Stacked(nn.Module):
    """Three layers under a scan, and a table that is only looked up."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(24, WIDTH, name="embed")(ids)
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, name="mix", use_bias=False)(x), None


def test_stacked_linen_layers_share_a_scheme_and_their_errors_add_up(batches):
    model = Stacked()
    params = model.init(jax.random.key(0), batches[0])["params"]
    found = qjax.search(
        model, batches, budget_bits=7, candidates=CANDIDATES, params=params, layers=["blocks/mix", "embed"]
    )
    assert [(layer.path, layer.size) for layer in found.layers] == [("blocks/mix", 3 * WIDTH**2), ("embed", 24 * WIDTH)]
    kernel, table = params["blocks"]["mix"]["kernel"], params["embed"]["embedding"]
    x = jnp.concatenate([table[ids] for ids in batches]).reshape(-1, WIDTH)
    error = 0.0
    for w in kernel:
        lost = x @ (qjax.quantize_array(w, CANDIDATES[1]).dequantize() - w)
        error, x = error + float(jnp.mean(jnp.sum(lost**2, axis=-1))), x + x @ w
    assert found.layers[0].options[1].error == pytest.approx(error, rel=1e-3)
    quantized = qjax.quantize(params, found.rules, model=model, inputs=(batches[0],))
    weights = [quantized["blocks"]["mix"]["kernel"], quantized["embed"]["embedding"]]
    assert sum(w.nbytes for w in weights) == found.nbytes


def test_a_distance_of_ones_own_is_for_models_without_logits(batches):
    class Pair(Tiny):
        def __call__(self, ids):
            return super().__call__(ids), ids

    with pytest.raises(CalibrationError, match="no logits: give distance="):
        qjax.search(Pair(), batches, budget_bits=6, candidates=CANDIDATES)

    def distance(base, found):
        return jnp.mean((base[0] - found[0]) ** 2)

    found = qjax.search(Pair(), batches, budget_bits=6, candidates=CANDIDATES, distance=distance)
    assert str(found.choice[0].scheme) == "w8a16"


def test_the_model_is_left_as_it_was_and_what_was_found_is_json(found, batches):
    model = Tiny()
    before = jax.tree.leaves(nnx.state(model))
    qjax.search(model, batches, budget_bits=6, candidates=CANDIDATES)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [layer["scheme"] for layer in written["layers"]] == [str(one.scheme) for one in found.choice]
    assert written["found"]["nbytes"] == found.nbytes and len(written["uniform"]) == 3
    assert len(found.plot().axes) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, CalibrationError, "give one of budget_bits and budget_bytes"),
        ({"budget_bits": 4, "budget_bytes": 9}, CalibrationError, "budget_bits=4, budget_bytes=9"),
        ({"budget_bits": math.nan}, CalibrationError, "a finite number; got bits=nan"),
        ({"budget_bits": 2}, CalibrationError, r"8,192 bytes \(2.000 bits.*the least.*: 14,336 bytes \(3.500 bits\)"),
        ({"budget_bits": 4, "candidates": [None]}, CalibrationError, "candidates are schemes, at least one"),
        ({"budget_bits": 4, "batches": []}, CalibrationError, "at least one batch, got none"),
        ({"budget_bits": 4, "recipe": "awq"}, CalibrationError, "recipe awq is of more than one layer"),
        ({"budget_bits": 4, "layers": "third"}, RuleError, "'third' matches nothing"),
        ({"budget_bits": 4, "candidates": ["w4a16:group_size=96"]}, QuantizeError, "group_size=96 does not divide K="),
        ({"budget_bits": 9, "distance": lambda a, b: a - b}, CalibrationError, "a distance is one finite number"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(batches, options, error, message):
    given = {"batches": batches, "candidates": CANDIDATES} | options
    with pytest.raises(error, match=message):
        qjax.search(Tiny(), given.pop("batches"), **given)


def test_nan_in_a_layer_is_named(batches):
    model = Tiny()
    model.first.bias.set_value(model.first.bias.get_value().at[0].set(jnp.nan))
    with pytest.raises(CalibrationError, match="second/kernel: batch 0 brings NaN"):
        qjax.search(model, batches, budget_bits=6, candidates=CANDIDATES)
