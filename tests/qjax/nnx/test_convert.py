"""`quantize` on modules of every shape: containers, ties, stacks, adapters, rules."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

import qjax
from qjax.errors import QuantizeError, RuleError
from qjax.models.llama import Llama
from qjax.models.llama_config import LlamaConfig
from qjax.nnx import QEinsum, QEmbed, QLinear, QLinearGeneral, QLoRALinear, QParam, quantize
from qjax.rules import Rule

W4 = "w4a16:group_size=32"
SIZE = 64


def linear(rngs: nnx.Rngs, **arguments: object) -> nnx.Linear:
    """A square one with a bias that is not zero."""
    return nnx.Linear(SIZE, SIZE, bias_init=nnx.initializers.normal(0.1), rngs=rngs, **arguments)


class Nested(nnx.Module):
    """Layers in every container that nnx has, and what is no Linear between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(16, SIZE, rngs=rngs)
        self.blocks = nnx.List([linear(rngs), linear(rngs)])
        self.named = nnx.Dict(a=linear(rngs), b=nnx.LinearGeneral(SIZE, (2, 32), rngs=rngs))
        self.pair = nnx.data((linear(rngs), nnx.Einsum("bhd,hdf->bf", (2, 32, SIZE), rngs=rngs)))
        self.tail = nnx.Sequential(linear(rngs), nnx.relu, linear(rngs))
        self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
        self.conv = nnx.Conv(SIZE, SIZE, kernel_size=(3,), rngs=rngs)
        self.head = nnx.Linear(SIZE, 16, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.relu(block(x))
        x = self.norm(self.named["a"](self.conv(x)))
        heads = jax.vmap(self.named["b"])(x)
        x = self.pair[0](jax.vmap(self.pair[1])(heads))
        return self.head(self.tail(x))


def dequantized(module: nnx.Module) -> nnx.State:
    """The state with float kernels again."""
    state = nnx.state(module)
    return nnx.map_state(lambda _, v: nnx.Param(v.get_value().dequantize()) if isinstance(v, QParam) else v, state)


class QuantizeTest(parameterized.TestCase):
    def test_every_container_is_walked_and_the_model_runs_on_rounded_weights(self) -> None:
        tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 16)
        model = Nested(nnx.Rngs(0))
        assert quantize(model, W4) is model
        classes = {"/".join(map(str, path)): type(m) for path, m in nnx.iter_modules(model)}
        linears = ("blocks/0", "blocks/1", "named/a", "pair/0", "tail/layers/0", "tail/layers/2")
        assert {p for p, c in classes.items() if c is QLinear} == set(linears)
        assert classes["named/b"] is QLinearGeneral and classes["pair/1"] is QEinsum
        assert (classes["embed"], classes["head"], classes["conv"]) == (nnx.Embed, nnx.Linear, nnx.Conv)
        twin = Nested(nnx.Rngs(1))
        nnx.update(twin, dequantized(model))
        chex.assert_trees_all_close(model(tokens), twin(tokens), rtol=1e-4, atol=1e-4)

    def test_a_swapped_layer_is_like_one_that_was_built(self) -> None:
        swapped = quantize(linear(nnx.Rngs(0)), W4)
        built = QLinear(SIZE, SIZE, scheme=W4, bias_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0))
        assert nnx.graphdef(swapped) == nnx.graphdef(built)
        chex.assert_trees_all_equal(nnx.state(swapped), nnx.state(built))

    def test_a_root_that_is_a_layer_is_swapped_itself(self) -> None:
        layer = linear(nnx.Rngs(0))
        assert quantize(layer, "w8a16") is layer and type(layer) is QLinear

    def test_bfloat16_kernels_stay_bfloat16(self) -> None:
        layer = quantize(linear(nnx.Rngs(0), param_dtype="bfloat16"), W4)
        assert layer.kernel.get_value().dtype == jnp.bfloat16
        assert layer(jnp.ones(SIZE, jnp.bfloat16)).dtype == jnp.bfloat16

    def test_heads_and_embeddings_are_quantized_where_a_rule_names_them(self) -> None:
        model = quantize(Nested(nnx.Rngs(0)), {"head|embed": "w8a16", ".*": W4})
        assert (type(model.head), type(model.embed)) == (QLinear, QEmbed)
        assert model.head.kernel.scheme == qjax.W8A16() and model.blocks[0].kernel.scheme.weight == "int4"

    def test_the_first_rule_wins_and_none_leaves_a_layer_alone(self) -> None:
        model = quantize(
            Nested(nnx.Rngs(0)), [(r"blocks/0", None), (r"blocks/.*", "w8a16"), Rule("named/a", qjax.NF4())]
        )
        found = [type(m) for m in (*model.blocks, model.named["a"], model.named["b"])]
        assert found == [nnx.Linear, QLinear, QLinear, nnx.LinearGeneral]

    def test_a_rule_that_matches_nothing_changes_nothing(self) -> None:
        model = Nested(nnx.Rngs(0))
        with pytest.raises(RuleError, match="'decoder/.*' matches nothing"):
            quantize(model, {"decoder/.*": W4, ".*": W4})
        assert not any(isinstance(m, QLinear) for _, m in nnx.iter_modules(model))
        with pytest.raises(RuleError, match="matches nothing"):
            quantize(quantize(model, W4), W4)

    def test_what_is_quantized_already_is_named(self) -> None:
        model = quantize(Nested(nnx.Rngs(0)), {"blocks/0": W4})
        with pytest.raises(RuleError, match="matches nothing: 'blocks/0' is quantized already; "):
            quantize(model, {"blocks/0": W4})
        with pytest.raises(RuleError, match="matches nothing: 'conv' is no layer that can be quantized; "):
            quantize(model, {"conv": W4})

    def test_a_module_of_subclasses_alone_is_told_why_nothing_matches(self) -> None:
        class Special(nnx.Linear):
            pass

        with pytest.raises(RuleError, match="matches nothing: 'layers/0' is a Special, a subclass, which may do more"):
            quantize(nnx.Sequential(Special(SIZE, SIZE, rngs=nnx.Rngs(0))), W4)

    def test_errors_name_the_path(self) -> None:
        model = nnx.Dict(up=nnx.Linear(96, 8, rngs=nnx.Rngs(0)))
        with pytest.raises(QuantizeError, match="up/kernel: group_size=64 does not divide K=96"):
            quantize(model, "w4a16:group_size=64")
        assert type(quantize(model, "w4a16:group_size=64", partial_groups=True)["up"]) is QLinear
        broken = nnx.Dict(up=linear(nnx.Rngs(0)))
        broken["up"].kernel[...] = broken["up"].kernel[...].at[3, 4].set(jnp.nan)
        with pytest.raises(QuantizeError, match="up/kernel: 1 of 4096 weights are NaN"):
            quantize(broken, W4)
        with pytest.raises(QuantizeError, match="got dict"):
            quantize({"kernel": jnp.ones((8, 8))}, W4)
        custom = nnx.Dict(up=linear(nnx.Rngs(0), dot_general=lambda *a, **k: None))
        with pytest.raises(NotImplementedError, match="up: dot_general"):
            quantize(custom, W4)

    def test_a_subclass_is_left_alone_with_a_warning(self) -> None:
        class Scaled(nnx.Linear):
            def __call__(self, x: jax.Array) -> jax.Array:
                return 2 * super().__call__(x)

        model = nnx.Dict(a=Scaled(SIZE, SIZE, rngs=nnx.Rngs(0)), b=linear(nnx.Rngs(0)))
        with self.assertLogs(level="WARNING") as logs:
            quantize(model, W4)
        assert type(model["a"]) is Scaled and "a (Scaled)" in logs.output[0]

    def test_the_float_kernel_is_let_go(self) -> None:
        model = nnx.List([linear(nnx.Rngs(i)) for i in range(3)])
        kernels = [weakref.ref(layer.kernel.get_raw_value()) for layer in model]
        quantize(model, W4)
        gc.collect()
        assert [kernel() for kernel in kernels] == [None] * 3

    def test_one_layer_at_a_time_is_float_beside_the_result(self) -> None:
        class Watched(nnx.List):
            pass

        model = Watched([nnx.Linear(512, 512, use_bias=False, rngs=nnx.Rngs(i)) for i in range(4)])
        kernels = [weakref.ref(layer.kernel.get_raw_value()) for layer in model]
        alive = []

        def count(items: list, what: str, *, show: bool | None) -> object:
            del what, show
            for item in items:
                alive.append(sum(kernel() is not None for kernel in kernels))
                yield item

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qjax.nnx.convert.track", count)
            quantize(model, W4)
        assert alive == [4, 3, 2, 1]


class TiesTest(parameterized.TestCase):
    def test_a_layer_held_twice_stays_one(self) -> None:
        layer = linear(nnx.Rngs(0))
        model = quantize(nnx.Dict(a=layer, b=nnx.List([layer])), W4)
        assert model["a"] is model["b"][0] is layer and type(layer) is QLinear
        assert len(jax.tree.leaves(nnx.state(model, QParam))) == 2

    def test_a_shared_param_becomes_one_shared_qparam(self) -> None:
        model = nnx.Dict(a=linear(nnx.Rngs(0)), b=linear(nnx.Rngs(1)))
        model["b"].kernel = model["a"].kernel
        quantize(model, W4)
        assert model["a"].kernel is model["b"].kernel and model["a"].bias is not model["b"].bias

    def test_embeddings_that_share_a_table_stay_tied(self) -> None:
        model = nnx.Dict(a=nnx.Embed(16, SIZE, rngs=nnx.Rngs(0)), b=nnx.Embed(16, SIZE, rngs=nnx.Rngs(1)))
        model["b"].embedding = model["a"].embedding
        quantize(model, {"[ab]": W4})
        assert model["a"].embedding is model["b"].embedding
        chex.assert_trees_all_equal(model["a"](jnp.arange(4)), model["b"](jnp.arange(4)))

    def test_a_tie_that_rules_would_part_is_an_error(self) -> None:
        model = nnx.Dict(a=linear(nnx.Rngs(0)), head=linear(nnx.Rngs(1)))
        model["head"].kernel = model["a"].kernel
        with pytest.raises(RuleError, match="a: its kernel is the same Param as one of head, which stays float"):
            quantize(model, W4)
        with pytest.raises(RuleError, match="which is quantized otherwise"):
            quantize(model, {"a": W4, "head": "w8a16"})
        assert quantize(model, {"a|head": W4})["a"].kernel is model["head"].kernel

    def test_a_table_tied_to_a_square_kernel_cannot_be_both(self) -> None:
        model = nnx.Dict(a=linear(nnx.Rngs(0)), e=nnx.Embed(SIZE, SIZE, rngs=nnx.Rngs(1)))
        model["e"].embedding = model["a"].kernel
        with pytest.raises(RuleError, match="quantized otherwise"):
            quantize(model, {"a|e": W4})

    def test_a_param_that_another_module_reads_is_not_parted_from_it(self) -> None:
        class Reader(nnx.Module):
            def __init__(self, kernel: nnx.Param) -> None:
                self.kernels = nnx.data([kernel])

        layer = linear(nnx.Rngs(0))
        with pytest.raises(RuleError, match="one of reader, which stays float"):
            quantize(nnx.Dict(layer=layer, reader=Reader(layer.kernel)), W4)

    def test_layers_that_know_each_other_are_no_endless_walk(self) -> None:
        model = nnx.Dict(a=linear(nnx.Rngs(0)))
        model["itself"] = model
        assert type(quantize(model, W4)["itself"]["a"]) is QLinear


class StacksTest(parameterized.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.make = nnx.vmap(lambda key: linear(nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.run = nnx.scan(lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        self.keys = jax.random.split(jax.random.key(0), 3)
        self.x = jax.random.normal(jax.random.key(1), (4, SIZE))

    @parameterized.parameters(W4, "w4a16:group_size=32,symmetric=false", "fp8", "nf4:double_quant=true", "nvfp4")
    def test_a_scan_slices_a_stack_like_any_array(self, scheme: str) -> None:
        layers = quantize(self.make(self.keys), scheme)
        chex.assert_shape(layers.kernel, (3, SIZE, SIZE))
        kernel, bias = layers.kernel.get_value().dequantize(), layers.bias[...]
        expected = self.x
        for i in range(3):
            expected = jnp.tanh(expected @ kernel[i] + bias[i])
        chex.assert_trees_all_close(self.run(self.x, layers), expected, rtol=1e-5, atol=1e-5)

    def test_a_stack_is_what_its_layers_are_alone(self) -> None:
        layers = quantize(self.make(self.keys), W4)
        one = quantize(linear(nnx.Rngs(self.keys[1])), W4)
        chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1], layers.kernel.get_value()), one.kernel.get_value())

    def test_vmap_builds_quantized_stacks_too(self) -> None:
        make = nnx.vmap(lambda key: QLinear(SIZE, SIZE, scheme=W4, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        chex.assert_trees_all_equal(
            make(self.keys).kernel.get_value(), quantize(self.make(self.keys), W4).kernel.get_value()
        )

    def test_layers_of_several_axes_are_stacked_too(self) -> None:
        def block(key: jax.Array) -> nnx.Module:
            return nnx.MultiHeadAttention(2, SIZE, decode=False, rngs=nnx.Rngs(key))

        stacked = quantize(nnx.vmap(block)(self.keys), "w8a16")
        assert stacked.query.kernel.shape == (3, SIZE, 2, SIZE // 2)
        x = jax.random.normal(jax.random.key(1), (4, 6, SIZE))
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        expected = x
        for key in self.keys:
            expected = block(key)(expected)
        chex.assert_trees_all_close(run(x, stacked), expected, atol=0.02)

    def test_errors_name_the_layer_of_the_stack(self) -> None:
        layers = self.make(self.keys)
        layers.kernel[...] = layers.kernel[...].at[2, 0, 0].set(jnp.inf)
        with pytest.raises(QuantizeError, match=r"kernel\[2\]: 1 of 4096"):
            quantize(layers, W4)


class AdaptersTest(parameterized.TestCase):
    def loss(self, model: nnx.Module) -> jax.Array:
        return jnp.sum(model(jnp.ones((2, SIZE))) ** 2)

    def test_a_lora_around_a_frozen_base_is_trained(self) -> None:
        model = nnx.LoRA(SIZE, 4, SIZE, base_module=linear(nnx.Rngs(0)), rngs=nnx.Rngs(1))
        quantize(model, "nf4")
        grads = nnx.grad(self.loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        y = model.base_module(jnp.ones((2, SIZE)))
        expected = (jnp.ones((2, SIZE)) @ model.lora_a[...]).T @ (2 * y)
        chex.assert_trees_all_close(grads["lora_b"].get_value(), expected, rtol=1e-4)

    def test_a_lora_linear_keeps_its_adapter(self) -> None:
        model = nnx.LoRALinear(SIZE, SIZE, lora_rank=4, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(0))
        lora, y = model.lora, model(jnp.ones((2, SIZE)))
        quantize(model, "w8a16")
        assert type(model) is QLoRALinear and model.lora is lora
        chex.assert_trees_all_close(model(jnp.ones((2, SIZE))), y, rtol=0.02, atol=0.1)

    def test_an_optimizer_steps_through_a_frozen_base(self) -> None:
        model = nnx.List([nnx.LoRALinear(SIZE, SIZE, lora_rank=4, rngs=nnx.Rngs(i)) for i in range(2)])
        quantize(model, W4)

        def loss(model: nnx.List) -> jax.Array:
            return self.loss(nnx.Sequential(*model))

        wrt = nnx.Any(nnx.LoRAParam)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
        frozen, before = nnx.to_pure_dict(nnx.state(model, QParam)), loss(model)

        @nnx.jit
        def step(model: nnx.List, optimizer: nnx.Optimizer) -> None:
            optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

        for _ in range(5):
            step(model, optimizer)
        assert loss(model) < before
        chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, QParam)), frozen)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_quantized_like_any_module(tied: bool) -> None:
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    config = LlamaConfig.from_hf(
        dict(model_type="llama", num_hidden_layers=2, max_position_embeddings=32, tie_word_embeddings=tied, **sizes)
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12).reshape(2, 6)
    logits = model(tokens)
    quantize(model, "w8a16")
    swapped = ["/".join(map(str, path)) for path, m in nnx.iter_modules(model) if type(m) is QLinear]
    assert len(swapped) == 14 and "layers/1/self_attn/q_proj" in swapped
    chex.assert_trees_all_close(model(tokens), logits, atol=0.1)
    quantize(model, {"embed_tokens": "w8a16"})
    chex.assert_trees_all_close(model(tokens), logits, atol=0.15)
