"""A model as a line of segments: the values are the model's, and every layer is found, however it is wrapped."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.calibration import linen_model, nnx_model
from qjax.calibration.program import trace
from qjax.calibration.segments import advance, cut, start
from qjax.calibration.tap import einsum_axes_of_x, rows


def inputs_of_layers(subject, batch):
    """Path and index of each layer -> what enters it, `[*stacked, T, K]`, every segment run once."""
    program = trace(subject.call, subject.leaves, batch, subject.targets)
    found, frontier = {}, start(program, batch)
    for segment in cut(program):
        seen, frontier = advance(segment, subject.leaves, frontier)
        for stage in segment.stages:
            for leaf, index in stage.units:
                (key,) = stage.inputs
                if key in seen:
                    x = rows(seen[key], key.contracted, key.stacked)
                    found[subject.targets[leaf].path, index] = np.asarray(x)
    return found


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(jnp.tanh(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(4, name="last")(x)


def test_layers_under_scan_and_remat_are_told_apart_and_see_what_the_model_computes():
    x = jax.random.normal(jax.random.key(0), (5, 8))
    variables = Stack().init(jax.random.key(1), x)
    found = inputs_of_layers(linen_model.subject(Stack(), variables, "w8a16", (x,), {}), (x,))
    dense = variables["params"]["layers"]["Dense_0"]
    for i in range(3):
        np.testing.assert_allclose(found["layers/Dense_0/kernel", (i,)], jnp.tanh(x), rtol=1e-5)
        x = x + jnp.tanh(x) @ dense["kernel"][i] + dense["bias"][i]
    np.testing.assert_allclose(found["last/kernel", ()], x, rtol=1e-5)


def test_layers_under_vmap_share_a_stacked_input():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1)
            return experts(4, name="experts")(x)

    x = jax.random.normal(jax.random.key(0), (5, 3, 8))
    variables = Model().init(jax.random.key(1), x)
    found = inputs_of_layers(linen_model.subject(Model(), variables, "w8a16", (x,), {}), (x,))
    np.testing.assert_array_equal(found["experts/kernel", ()], x.swapaxes(0, 1))


def test_attention_meets_its_input_once_and_its_heads_as_rows_of_k():
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = attention.init(jax.random.key(1), x)
    subject = linen_model.subject(attention, variables, "w8a16", (x,), {})
    program = trace(subject.call, subject.leaves, (x,), subject.targets)
    stages = [stage for segment in cut(program) for stage in segment.stages]
    assert [len(stage.units) for stage in stages] == [3, 1]
    found = inputs_of_layers(subject, (x,))
    assert found["out/kernel", ()].shape == (10, 8)
    np.testing.assert_array_equal(found["query/kernel", ()], x.reshape(10, 8))


def test_an_nnx_model_is_left_as_it_is_and_its_scanned_layers_are_found():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.dense(x))

    class Model(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda key: Block(nnx.Rngs(key)), in_axes=0)
            self.blocks = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)

    model, x = Model(), jax.random.normal(jax.random.key(1), (5, 8))
    found = inputs_of_layers(nnx_model.subject(model, "w8a16"), (x,))
    assert type(model.blocks.dense) is nnx.Linear
    for i in range(3):
        np.testing.assert_allclose(found["blocks/dense/kernel", (i,)], x, rtol=1e-5, atol=1e-6)
        x = jnp.tanh(x @ model.blocks.dense.kernel[i] + model.blocks.dense.bias[i])


def test_a_layer_inside_of_a_while_loop_is_refused_by_the_name_of_the_construct():
    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 0, self.dense, x)

    x = jnp.ones((2, 4))
    subject = nnx_model.subject(Model(), "w8a16")
    with pytest.raises(NotImplementedError, match="`while`"):
        trace(subject.call, subject.leaves, (x,), subject.targets)


@pytest.mark.parametrize(
    ("spec", "rank", "axes"),
    [
        ("btd,df->btf", 3, ((2,), ())),
        ("...d,df->...f", 4, ((3,), ())),
        ("bthd,hdf->btf", 4, ((2, 3), ())),
        ("ebd,edf->ebf", 3, ((2,), (0,))),
        ("d...,df->...f", 3, ((0,), ())),
    ],
)
def test_an_einsum_says_which_axes_of_x_are_contracted(spec, rank, axes):
    assert einsum_axes_of_x(spec, rank) == axes
