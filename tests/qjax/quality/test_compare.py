"""`compare` against its definitions in NumPy, and where it refuses."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.errors import QJaxError
from qjax.quality.compare import compare

VOCABULARY, WIDTH, WINDOW = 32, 16, 12
SCHEME = "w4a16:group_size=16"


class Tiny(nnx.Module):
    """A language model of a look-up, a layer that is called twice, and a head."""

    def __init__(self, seed=0, vocabulary=VOCABULARY, width=WIDTH):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, ids):
        x = 4 * self.embed(ids)
        return self.head(x + jnp.tanh(self.mix(jnp.tanh(self.mix(x)))))


def quantized(rules=((".*", SCHEME),), **options):
    return qjax.nnx.quantize(Tiny(**options), rules)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCABULARY, 5 * WINDOW + 3)


def tensors(model):
    kernels = (model.mix.kernel.get_value(), model.head.kernel.get_value())
    mix, head = (np.float64(k.dequantize() if isinstance(k, qjax.QTensor) else k) for k in kernels)
    return np.float64(model.embed(jnp.arange(VOCABULARY))), mix, head


def run_by_hand(model, ids):
    """Logits, and (inputs, outputs) of both calls of `mix`, in float64."""
    embed, mix, head = tensors(model)
    x = 4 * embed[ids]
    first = x @ mix
    second = np.tanh(first) @ mix
    return (x + np.tanh(second)) @ head, [(x, first), (np.tanh(first), second)]


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_figure_is_what_its_definition_says(ids, batch_size):
    base, model = Tiny(), quantized([("mix", SCHEME)])
    found = compare(base, model, ids, window=WINDOW, batch_size=batch_size)
    rows = ids[: 5 * WINDOW].reshape(5, WINDOW)
    (wanted, wanted_calls), (got, got_calls) = (run_by_hand(one, rows) for one in (base, model))
    theirs, ours = log_softmax(wanted[:, :-1]), log_softmax(got[:, :-1])
    likelihood = [np.take_along_axis(p, rows[:, 1:, None], axis=-1)[..., 0] for p in (theirs, ours)]
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    np.testing.assert_allclose(found.kl, kl, atol=2e-6)
    assert [found.base_perplexity, found.perplexity] == pytest.approx([np.exp(-p.mean()) for p in likelihood], rel=1e-5)
    assert [found.mean_kl, found.kl.max()] == pytest.approx([kl.mean(), kl.max()], rel=1e-3)
    assert found.top1 == (theirs.argmax(-1) == ours.argmax(-1)).mean()
    window, position, worst_kl = found.worst_tokens(1)[0]  # the same token elsewhere differs by rounding
    assert worst_kl == found.kl.max() == found.kl[window, position - 1]
    assert kl[window, position - 1] == pytest.approx(kl.max(), rel=1e-3)

    (layer,) = found.layers
    assert (layer.path, layer.base_scheme, layer.scheme) == ("mix", None, SCHEME)
    mix = tensors(model)[1]
    x, y, z = (
        np.concatenate([a.reshape(-1, WIDTH) for a in arrays])
        for arrays in ([x for x, _ in wanted_calls], [y for _, y in wanted_calls], [z for _, z in got_calls])
    )
    np.testing.assert_allclose(layer.signal, (y**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(layer.noise, ((z - y) ** 2).sum(0), rtol=1e-3)
    np.testing.assert_allclose(layer.own_noise, ((x @ mix - y) ** 2).sum(0), rtol=1e-3)
    assert layer.sqnr == pytest.approx(10 * np.log10((y**2).sum() / ((z - y) ** 2).sum()), abs=0.01)
    np.testing.assert_allclose(layer.outliers(), np.abs(x).max(0) / np.sqrt((x**2).mean()), rtol=1e-5)
    worst = layer.worst(3)
    assert [one.channel for one in worst] == np.argsort(-((x @ mix - y) ** 2).sum(0))[:3].tolist()
    assert worst[0].share == pytest.approx(layer.own_noise.max() / layer.own_noise.sum())


def test_a_model_beside_itself_is_exact(ids):
    model = quantized()
    found = compare(model, model, ids, window=WINDOW)
    assert found.kl.max() == 0 and found.top1 == 1 and found.perplexity == found.base_perplexity
    assert {layer.path for layer in found.layers} == {"mix"}, "a head is left alone unless it is named"
    assert all(layer.sqnr == layer.own_sqnr == math.inf for layer in found.layers)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["layers"][0]["sqnr_db"] is None and written["layers"][0]["worst_channels"] == []


def test_two_float_models_have_no_layers_to_compare(ids):
    found = compare(Tiny(), Tiny(seed=1), ids, window=WINDOW)
    assert found.layers == () and found.mean_kl > 0.01


def test_both_may_be_quantized_and_tables_are_compared_too(ids):
    rules = [("embed|mix", "w8a16:group_size=16")]
    found = compare(quantized(rules), quantized([("embed|mix|head", SCHEME)]), ids, window=WINDOW)
    layers = {layer.path: layer for layer in found.layers}
    assert layers.keys() == {"embed", "mix", "head"}
    assert (layers["mix"].base_scheme, layers["head"].base_scheme) == ("w8a16:group_size=16", None)
    assert layers["embed"].outliers() is None and len(layers["embed"].signal) == WIDTH
    assert all(10 < layer.own_sqnr < 40 for layer in found.layers)


def test_a_channel_that_the_base_never_uses_has_a_finite_sqnr(ids):
    base, model = Tiny(), quantized([("mix", SCHEME)])
    base.mix.kernel.set_value(base.mix.kernel.get_value().at[:, 3].set(0))
    (layer,) = compare(base, model, ids, window=WINDOW).layers
    assert np.isfinite(layer.channel_sqnr()).all() and layer.channel_sqnr().argmin() == 3
    assert layer.worst(1)[0].channel == 3


def test_one_token_windows_and_texts_that_are_too_short_are_refused(ids):
    for text, options in ((ids[: WINDOW - 1], {}), (ids[:0], {}), (ids, {"max_windows": 0})):
        with pytest.raises(QJaxError, match="expected at least one window"):
            compare(Tiny(), quantized(), text, window=WINDOW, **options)


@pytest.mark.parametrize(
    ("base", "model", "message"),
    [
        (lambda: Tiny(vocabulary=33), quantized, "the base has 33 tokens, the model 32"),
        (lambda: Tiny(width=32), quantized, "mix: 16 -> 16 channels, in the base 32 -> 32"),
        (lambda: nnx.Embed(VOCABULARY, VOCABULARY, rngs=nnx.Rngs(0)), quantized, "mix: the base has no such layer"),
        (lambda: lambda ids: jnp.zeros((*ids.shape, VOCABULARY)), quantized, "models are nnx modules.*got function"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(ids, base, model, message):
    with pytest.raises(QJaxError, match=message):
        compare(base(), model(), ids, window=WINDOW)


def test_a_layer_that_never_runs_is_named(ids):
    models = [Tiny(), quantized()]
    for one in models:
        one.spare = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    qjax.nnx.quantize(models[1], [("spare", SCHEME)])
    with pytest.raises(QJaxError, match="spare: no call of this layer was seen"):
        compare(*models, ids, window=WINDOW)


def test_the_models_are_left_as_they_were(ids):
    base, model = Tiny(), quantized()
    before = [jax.tree.leaves(nnx.state(one)) for one in (base, model)]
    compare(base, model, ids, window=WINDOW)
    assert type(base.mix) is nnx.Linear and type(model.mix) is qjax.nnx.QLinear
    after = [jax.tree.leaves(nnx.state(one)) for one in (base, model)]
    assert all(a is b for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))
