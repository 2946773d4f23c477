"""Factors that go into the rows of a kernel before the layer: where they can, where they must not, what is left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_llama import small_llama

import qjax
import qjax.linen
from qjax.calibration import calibrate as module
from qjax.calibration import linen_model, nnx_model
from qjax.calibration.channels import after
from qjax.calibration.fold_linear import Linears, divided, undividable
from qjax.calibration.program import Step, trace
from qjax.calibration.segments import cut

SCHEME = "w4a16:group_size=16"
RULES = {"up|down|first|value|out": SCHEME}


class Gated(nnx.Module):
    """A Llama's, with biases."""

    def __init__(self, kind="plain"):
        rngs = nnx.Rngs(0)

        def linear():
            layer = nnx.Linear(32, 32, rngs=rngs, bias_init=nnx.initializers.normal(1.0))
            layer.kernel.set_value(layer.kernel[...] * jnp.linspace(0.3, 3, 32))
            return layer

        self.gate, self.up, self.down, self.kind = linear(), linear(), linear(), kind

    def __call__(self, x):
        up = self.up(x)
        hidden = nnx.silu(self.gate(x)) * self.between(up, x)
        y = self.down(hidden)
        if self.kind == "another reader":
            return y + up
        if self.kind == "another reader of the product":
            return y + hidden
        return (y, up) if self.kind == "returned" else y

    def between(self, up, x):
        if self.kind == "activation":
            return nnx.relu(up)
        if self.kind == "number":
            return up + 1.0
        if self.kind == "twice":
            return self.up(up)
        if self.kind == "squared":
            return up * up
        if self.kind == "tied":
            return up + x @ self.up.kernel
        if self.kind == "mixed channels":
            return up[..., ::-1]
        return up


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        gate, up = (nn.Dense(32, name=name, bias_init=nn.initializers.normal()) for name in ("gate", "up"))
        return x + nn.Dense(16, name="down")(nn.silu(gate(x)) * up(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="blocks")(x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x[None])[0]


def linen_subject(model, x, scheme=SCHEME):
    variables = model.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), variables)
    return linen_model.subject(model, variables, scheme, (x,), {})


def found_in(subject, batch):
    """The stages of a model, each with the kernel before it or None."""
    program = trace(subject.call, subject.leaves, batch, subject.targets)
    linears = Linears.of(program, subject.layouts())
    stages = [stage for segment in cut(program) for stage in segment.stages if len(stage.inputs) == 1]
    return [(stage, linears.before(stage.inputs[0], len(stage.units))) for stage in stages]


X = jax.random.normal(jax.random.key(0), (40, 32))
IDS = jax.random.randint(jax.random.key(0), (2, 16), 0, 32)
MODELS = {
    "gated": (lambda: nnx_model.subject(Gated(), SCHEME), (X,), ["down"]),
    "stacked": (lambda: linen_subject(Stack(), X[:, :16]), (X[:, :16],), ["down", "down"]),
    "attention of linen": (lambda: linen_subject(Attention(), X), (X,), ["out"]),
    "groups of queries": (
        lambda: nnx_model.subject(small_llama(hidden=32, heads=4, qkv_bias=True, mlp_bias=True), SCHEME),
        (IDS,),
        ["o_proj", "down_proj"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_float_model_puts_out_the_same_when_rows_are_divided_and_columns_multiplied(name):
    make, batch, expected = MODELS[name]
    subject = make()
    call, layouts = jax.jit(subject.call), subject.layouts()
    before = call(subject.leaves, batch)
    leaves, folded = list(subject.leaves), []
    for stage, source in found_in(subject, batch):
        if source is None:
            continue
        (leaf, index), (theirs, part) = *stage.units, source.unit
        folded.append(subject.targets[leaf].path.split("/")[-2])
        outputs = np.prod(layouts[theirs].out_shape)
        rows = jnp.exp(jax.random.normal(jax.random.key(len(folded)), (outputs,)))
        assert {*source.outputs} == {*range(outputs)}
        up, down = leaves[theirs], leaves[leaf]
        leaves[theirs] = up.at[part].set(up[part] / rows.reshape(layouts[theirs].out_shape))
        columns = rows[source.outputs].reshape(*layouts[leaf].in_shape, 1)
        leaves[leaf] = down.at[index].set(down[index] * columns)
        assert len(source.biases) == 1
        for at, bias in source.divide(dict(enumerate(leaves)), rows).items():
            leaves[at] = bias
    assert folded == expected
    np.testing.assert_allclose(call(leaves, batch), before, atol=2e-5 * float(jnp.max(jnp.abs(before))))


@pytest.mark.parametrize(
    "kind",
    ["another reader", "another reader of the product", "returned", "activation", "number", "twice", "squared", "tied"]
    + ["mixed channels"],
)
@pytest.mark.parametrize("unfolded", ["keep", "skip"])
def test_nothing_is_folded_where_it_would_change_what_the_model_puts_out(kind, unfolded):
    model = Gated(kind)
    assert found_in(nnx_model.subject(model, SCHEME), (X,))[-1][1] is None
    bias = model.up.bias[...]
    qjax.calibrate(model, [X], f"awq:unfolded={unfolded}", SCHEME)
    assert (model.down.kernel.get_value().input_scale is None) == (unfolded == "skip")
    np.testing.assert_array_equal(model.up.bias[...], bias)


def test_two_layers_of_one_kernel_keep_their_factors():
    class Model(nnx.Module):
        def __init__(self):
            self.one, self.two = Gated(), Gated()
            self.two.up.kernel = self.one.up.kernel

        def __call__(self, x):
            return self.two(self.one(x))

    model = Model()
    assert all(source is None for _, source in found_in(nnx_model.subject(model, SCHEME), (X,)))


def test_a_norm_of_which_the_model_gives_the_output_back_is_left_alone():
    class Model(nnx.Module):
        def __init__(self):
            self.norm, self.dense = nnx.RMSNorm(32, rngs=nnx.Rngs(0)), nnx.Linear(32, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            x = self.norm(x)
            return self.dense(x), x

    model = Model()
    qjax.calibrate(model, [X], "awq", SCHEME)
    np.testing.assert_array_equal(model.norm.scale[...], 1)
    assert model.dense.kernel.get_value().input_scale is not None


def calibrated(recipe, scheme, *, folded, monkeypatch):
    """A model calibrated, its factors folded into linears or not."""
    with monkeypatch.context() as patch:
        if not folded:
            patch.setattr(module.Linears, "before", lambda *_: None)
        return qjax.calibrate(Gated(), [X], recipe, scheme)


@pytest.mark.parametrize("recipe", ["awq", "awq:rounding=gptq", "smoothquant:unfolded=keep"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_codes_are_those_that_were_searched_and_scales_are_divided_once(recipe, dtype, monkeypatch):
    scheme = f"w4a16:group_size=16,symmetric=false,scale_dtype={dtype}"
    kept, model = (calibrated(recipe, scheme, folded=folded, monkeypatch=monkeypatch) for folded in (False, True))
    old, new = ({n: getattr(m, n).kernel.get_value() for n in ("up", "down")} for m in (kept, model))
    factors = 1 / old["down"].input_scale
    assert new["down"].input_scale is None and np.ptp(factors) > 0.1
    for name in ("up", "down"):
        np.testing.assert_array_equal(new[name].packed, old[name].packed)
        np.testing.assert_array_equal(new[name].zero_point, old[name].zero_point)
    np.testing.assert_array_equal(new["down"].scale, old["down"].scale)
    exact = np.asarray(old["up"].scale, np.float32) / np.asarray(factors)[:, None]
    assert new["up"].scale.dtype == dtype
    np.testing.assert_allclose(new["up"].scale, exact, rtol=2**-11 if dtype == "float16" else 1e-6)
    np.testing.assert_allclose(model.up.bias[...] * factors, kept.up.bias[...], rtol=1e-6)
    want = kept(X)
    error = 2e-6 if dtype == "float32" else 2**-10
    np.testing.assert_allclose(model(X), want, atol=error * float(jnp.max(jnp.abs(want))))


@pytest.mark.parametrize(
    ("rules", "folded"),
    [
        ({"up|down": SCHEME}, True),
        ({"up": "w8a16", "down": SCHEME}, True),
        ({"up": "nf4:block_size=32", "down": SCHEME}, True),
        ({"down": SCHEME}, False),
        ({"up": "w4a16:group_size=16,scale_dtype=bfloat16", "down": SCHEME}, False),
    ],
    ids=str,
)
def test_a_kernel_takes_factors_up_where_it_is_quantized_with_scales_of_rows(rules, folded):
    model = qjax.calibrate(Gated(), [X], "smoothquant:unfolded=keep", rules)
    assert (model.down.kernel.get_value().input_scale is None) == folded


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("w4a16:group_size=16", None),
        ("w8a8_int8", None),
        ("nf4", None),
        ("nf4:double_quant=true", "scales that are quantized"),
        ("mxfp4", "scales that are quantized"),
        ("nvfp4", "scales that are quantized"),
        ("w4a16:scale_dtype=bfloat16", "scales that are quantized"),
        ("fp8:granularity=block", "scales of 128 rows"),
        ("fp8:granularity=tensor", "scales of all rows"),
    ],
)
def test_a_weight_says_why_its_rows_cannot_be_divided(scheme, why):
    assert undividable(qjax.quantize_array(jax.random.normal(jax.random.key(0), (256, 256)), scheme)) == why


def test_scales_that_leave_float16_become_float32():
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (128, 8)), "w4a16")
    rows = jnp.ones(8).at[3].set(1e5)
    small = divided(w, rows)
    assert w.scale.dtype == "float16" and small.scale.dtype == "float32"
    np.testing.assert_allclose(small.dequantize() * rows, w.dequantize(), rtol=1e-6)


def test_stacked_layers_are_folded_each_on_its_own(monkeypatch):
    x = X[:, :16]
    params = Stack().init(jax.random.key(0), x)["params"]
    scheme = "w4a16:group_size=16,scale_dtype=float32"
    found = qjax.calibrate(Stack(), [x], "awq", scheme, params=params)
    monkeypatch.setattr(module.Linears, "before", lambda *_: None)
    kept = qjax.calibrate(Stack(), [x], "awq", scheme, params=params)
    assert found["blocks"]["down"]["kernel"].input_scale is None
    assert kept["blocks"]["down"]["kernel"].input_scale.shape == (2, 32)
    y, want = (qjax.linen.apply(Stack(), {"params": p}, x) for p in (found, kept))
    np.testing.assert_allclose(y, want, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_queries_that_share_values_share_factors():
    model = qjax.calibrate(small_llama(hidden=32, heads=4), [IDS], "awq", SCHEME)
    attention = model.layers[0].self_attn
    assert attention.o_proj.kernel.get_value().input_scale is None
    stages = found_in(nnx_model.subject(small_llama(hidden=32, heads=4), SCHEME), (IDS,))
    source = next(source for _, source in stages if source is not None)
    np.testing.assert_array_equal(source.outputs, np.repeat(np.arange(16).reshape(2, 8), 2, axis=0).ravel())


@pytest.mark.parametrize(
    ("name", "params", "shapes", "labels", "expected"),
    [
        ("reshape", dict(new_sizes=(6, 4), dimensions=None), [(2, 3, 4)], (1, 1, 4), (1, 4)),
        ("reshape", dict(new_sizes=(6, 2, 2), dimensions=None), [(6, 4)], (1, 4), (1, 2, 2)),
        ("reshape", dict(new_sizes=(24,), dimensions=None), [(6, 4)], (1, 4), (24,)),
        ("reshape", dict(new_sizes=(2**20, 1, 2), dimensions=None), [(2**21,)], (2**21,), None),
        ("reshape", dict(new_sizes=(1, 4, 1), dimensions=None), [(4,)], (4,), (1, 4, 1)),
        ("dot_general", dict(dimension_numbers=(((1,), (0,)), ((), ()))), [(6, 4), (4, 5)], (1, 4), None),
        ("dot_general", dict(dimension_numbers=(((0,), (1,)), ((), ()))), [(6, 4), (5, 6)], (1, 4), (4, 1)),
        ("dot_general", dict(dimension_numbers=(((1,), (0,)), ((), ()))), [(5, 6), (6, 4)], (1, 4), (1, 4)),
        ("div", {}, [(6, 4), (6, 4)], (1, 4), (1, 4)),
        ("convert_element_type", dict(new_dtype=np.dtype("int8")), [(6, 4)], (1, 4), None),
        ("convert_element_type", dict(new_dtype=jnp.bfloat16), [(6, 4)], (1, 4), (1, 4)),
        ("exp", {}, [(6, 4)], (1, 4), None),
    ],
)
def test_labels_follow_a_step(name, params, shapes, labels, expected):
    at = 1 if shapes[0] == (5, 6) else 0
    made = after(Step(name, params, lambda *_: [], (), ()), at, np.arange(np.prod(labels)).reshape(labels), shapes)
    assert (None if made is None else made.shape) == expected
