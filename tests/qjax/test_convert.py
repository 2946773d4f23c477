"""`quantize` on params trees: what is quantized, what is left alone, what is said of what cannot be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from flax.core import FrozenDict

from qjax import convert, flax_kernel
from qjax.convert import quantize
from qjax.errors import QuantizeError, RuleError, SchemeError
from qjax.qtensor import QTensor, is_qtensor
from qjax.quantize import quantize_array
from qjax.rules import Rule
from qjax.schemes import W4A16, W8A16

W4, W8 = W4A16(group_size=32), W8A16()


class Net(nn.Module):
    """One of everything."""

    @nn.compact
    def __call__(self, ids: jax.Array, *, loud: bool = False) -> jax.Array:
        x = nn.Embed(50, 64, name="embed")(ids)
        x = nn.Conv(64, (3,), name="conv")(x)
        x = nn.LayerNorm(name="norm")(x)
        h = nn.DenseGeneral((4, 16), name="split")(x)
        x = x + nn.DenseGeneral(64, axis=(-2, -1), name="merge")(h)
        x = nn.Dense(64, name="mlp")(x) * (2 if loud else 1)
        return nn.Dense(50, name="lm_head")(x)


IDS = jnp.arange(10).reshape(2, 5)
NET = Net()
PARAMS = NET.init(jax.random.key(0), IDS)["params"]


def quantized(tree) -> set[str]:
    """Paths of the QTensors in a tree."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, leaf in found if is_qtensor(leaf)}


class WhatIsQuantizedTest(parameterized.TestCase):
    def test_without_a_model_a_bare_scheme_takes_the_matrices_but_no_head(self):
        with self.assertLogs(logger="absl", level="WARNING") as logs:
            got = quantize(PARAMS, W4)
        self.assertEqual(quantized(got), {"mlp/kernel"})
        self.assertLen(logs.records, 1)
        for path in ("split/kernel", "merge/kernel"):
            self.assertIn(path, logs.output[0])
        self.assertNotIn("conv/kernel", logs.output[0])  # with a model it would be left alone as well

    def test_with_a_model_it_takes_every_dense_kernel_and_no_convolution(self):
        got = quantize(PARAMS, W4, NET, (IDS,))
        self.assertEqual(quantized(got), {"mlp/kernel", "split/kernel", "merge/kernel"})
        self.assertEqual(got["split"]["kernel"].shape, (64, 4, 16))
        self.assertEqual(got["merge"]["kernel"].shape, (4, 16, 64))
        for name in ("conv", "norm", "embed", "lm_head"):
            for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(PARAMS[name]), strict=True):
                self.assertIs(a, b)

    def test_values_are_those_of_quantize_array(self):
        got = quantize(PARAMS, W4, NET, (IDS,))
        want = quantize_array(PARAMS["merge"]["kernel"].reshape(64, 64), W4)
        np.testing.assert_array_equal(got["merge"]["kernel"].packed, want.packed)
        np.testing.assert_array_equal(got["merge"]["kernel"].scale, want.scale)

    def test_rules_name_heads_and_embeddings_and_choose_schemes(self):
        got = quantize(PARAMS, [("embed|lm_head", W8), ("mlp", None), (".*", W4)], NET, (IDS,))
        self.assertEqual(
            {p: str(get(got, p).scheme) for p in quantized(got)},
            {"embed/embedding": "w8a16", "lm_head/kernel": "w8a16", "split/kernel": str(W4), "merge/kernel": str(W4)},
        )
        self.assertEqual(got["embed"]["embedding"].shape, (50, 64))
        self.assertEqual(got["embed"]["embedding"].in_features, 64)

    def test_a_rule_may_tell_the_axes_instead_of_a_model(self):
        got = quantize(PARAMS, [Rule("split", W4, axis=(0,), stacked=()), Rule("merge", W4, axis=(0, 1), stacked=())])
        want = quantize(PARAMS, {"split|merge": W4}, NET, (IDS,))
        for name in ("split", "merge"):
            np.testing.assert_array_equal(got[name]["kernel"].packed, want[name]["kernel"].packed)
            self.assertEqual(got[name]["kernel"].axes, want[name]["kernel"].axes)

    def test_a_rule_may_tell_that_matrices_are_stacked(self):
        stack = jax.random.normal(jax.random.key(0), (3, 64, 8))
        got = quantize({"layers": {"kernel": stack}}, Rule("layers", W4, axis=(1,), stacked=(0,)))["layers"]["kernel"]
        self.assertEqual((got.stack_shape, got.in_features, got.shape), ((3,), 64, (3, 64, 8)))

    def test_what_is_quantized_already_stays(self):
        once = quantize(PARAMS, {"mlp": W8}, NET, (IDS,))
        twice = quantize(once, W4, NET, (IDS,))
        self.assertIs(twice["mlp"]["kernel"], once["mlp"]["kernel"])
        self.assertEqual(quantized(twice), {"mlp/kernel", "split/kernel", "merge/kernel"})

    def test_partial_groups_for_all_or_by_rule(self):
        params = {"a": {"kernel": jnp.ones((80, 8))}, "b": {"kernel": jnp.ones((64, 8))}}
        for rules, options in ((W4, dict(partial_groups=True)), (Rule(".*", W4, partial_groups=True), {})):
            self.assertEqual(quantize(params, rules, **options)["a"]["kernel"].scale.shape, (8, 3))

    def test_k_pieces_by_rule(self):
        got = quantize({"a": {"kernel": jnp.ones((192, 8))}}, Rule("a", W4, k_pieces=2))["a"]["kernel"]
        self.assertEqual((got.k_piece, got.shape), ((96, 128), (192, 8)))


def get(tree, path: str) -> QTensor:
    """A leaf by its path."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


class TreeTest(parameterized.TestCase):
    @parameterized.parameters(dict, FrozenDict)
    def test_the_tree_keeps_its_type_and_other_collections(self, make):
        variables = make({"params": PARAMS, "batch_stats": {"n": jnp.zeros(3)}})
        got = quantize(variables, W4, NET, (IDS,))
        self.assertIsInstance(got, make)
        self.assertIs(got["batch_stats"]["n"], variables["batch_stats"]["n"])
        self.assertEqual(quantized(got["params"]), {"mlp/kernel", "split/kernel", "merge/kernel"})

    def test_a_root_layer_has_an_empty_path(self):
        got = quantize({"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}, W4)
        self.assertEqual(quantized(got), {"kernel"})

    def test_numpy_params_do(self):
        host = jax.tree.map(np.asarray, PARAMS)
        got = quantize(host, W4, NET, (jax.ShapeDtypeStruct(IDS.shape, IDS.dtype),))
        np.testing.assert_array_equal(
            got["mlp"]["kernel"].packed, quantize(PARAMS, W4, NET, IDS)["mlp"]["kernel"].packed
        )

    def test_shapes_are_learned_with_the_models_own_arguments(self):
        got = quantize(PARAMS, W4, NET, (IDS,), loud=True, rngs={"dropout": jax.random.key(0)})
        self.assertIn("split/kernel", quantized(got))

    def test_it_can_be_traced(self):
        shapes = jax.eval_shape(lambda p: quantize(p, W4, NET, (IDS,)), PARAMS)
        self.assertEqual(shapes["mlp"]["kernel"].shape, (64, 64))
        self.assertEqual(shapes["mlp"]["kernel"].nbytes, quantize(PARAMS, W4, NET, IDS)["mlp"]["kernel"].nbytes)


class ErrorTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("no such path", {"encoder/.*": W4}, RuleError, r"params: rule 'encoder/\.\*' matches nothing: .*'mlp'"),
        (
            "a convolution",
            {"conv": W4},
            RuleError,
            "rule 'conv' matches nothing: 'conv' is no layer that can be quantized",
        ),
        ("a norm", {"norm": W4}, RuleError, "rule 'norm' matches nothing"),
        ("unknown scheme", "w5a4", SchemeError, "unknown scheme 'w5a4'"),
        ("group", W4A16(group_size=128), QuantizeError, "^merge/kernel: group_size=128 does not divide K=64"),
    )
    def test_with_a_model(self, rules, error, message):
        with self.assertRaisesRegex(error, message):
            quantize(PARAMS, rules, NET, (IDS,))

    def test_nan_is_named_by_its_path(self):
        bad = {**PARAMS, "mlp": {"kernel": PARAMS["mlp"]["kernel"].at[3, 4].set(jnp.nan)}}
        with self.assertRaisesRegex(QuantizeError, "^mlp/kernel: 1 of 4096 weights are NaN or inf"):
            quantize(bad, W4)

    def test_where_nothing_is_explained_the_error_says_what_would(self):
        params = {"layers": {"kernel": jnp.ones((3, 64, 8)), "bias": jnp.ones((3, 8))}, "lm_head": PARAMS["lm_head"]}
        message = r"the shape of layers/kernel \(3, 64, 8\) does not .* give model= and inputs=, or axis= and stacked="
        with self.assertRaisesRegex(RuleError, message):
            quantize(params, W4)

    def test_what_is_quantized_already_is_named(self):
        once = quantize(PARAMS, W4, NET, (IDS,))
        with self.assertRaisesRegex(RuleError, r"rule '\.\*' matches nothing.*'mlp' is quantized already"):
            quantize({"mlp": once["mlp"]}, W4)
        with self.assertRaisesRegex(RuleError, "rule 'mlp' matches nothing: 'mlp' is quantized already"):
            quantize(once, {"mlp": W4}, NET, (IDS,))

    @parameterized.parameters(dict(axis=(0, 1)), dict(axis=(1,), stacked=()), dict())
    def test_a_convolution_that_a_rule_names_is_an_error_without_a_model_too(self, **told):
        with self.assertRaisesRegex(
            QuantizeError, r"^conv/kernel: shape \(3, 64, 64\) is a convolution's, by its name"
        ):
            quantize(PARAMS, [Rule("conv|mlp", W4, **told)])

    def test_axes_of_everything_are_not_a_convolutions(self):
        got = quantize({name: PARAMS[name] for name in ("conv", "split")}, Rule(".*", W4, axis=(0,)))
        self.assertEqual(quantized(got), {"split/kernel"})

    def test_stacked_matrices_may_be_called_what_they_like(self):
        got = quantize({"conv_in": {"kernel": jnp.ones((3, 64, 8))}}, Rule("conv_in", W4, axis=(1,), stacked=(0,)))
        self.assertEqual(quantized(got), {"conv_in/kernel"})

    def test_a_rank_that_nobody_explained_is_an_error_where_a_rule_names_it(self):
        with self.assertRaisesRegex(QuantizeError, r"^split/kernel: shape \(64, 4, 16\) .* give axis= and stacked="):
            quantize(PARAMS, {"split": W4})

    def test_shapes_are_no_weights(self):
        shapes = jax.eval_shape(lambda: PARAMS)
        for rules, options in ((W4, {}), ({"split": W4}, dict(model=NET, inputs=(IDS,)))):
            with self.assertRaisesRegex(QuantizeError, "ShapeDtypeStruct.* is a shape and no array; .* jax.eval_shape"):
                quantize(shapes, rules, **options)
        with self.assertRaisesRegex(QuantizeError, "^kernel: .* is a shape and no array"):
            quantize_array(shapes["mlp"]["kernel"], W4)

    def test_integers_are_no_weights(self):
        with self.assertRaisesRegex(QuantizeError, "^a/kernel: dtype int32 cannot be quantized"):
            quantize({"a": {"kernel": jnp.ones((64, 8), jnp.int32)}}, W4)

    def test_layers_stacked_over_another_axis_than_the_first(self):
        stacked = nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=2)(8)
        x = jnp.ones((2, 3, 64))
        with self.assertRaisesRegex(NotImplementedError, r"^kernel: layers are stacked over axes \(1,\)"):
            quantize(stacked.init(jax.random.key(0), x), W4, stacked, (x,))

    def test_a_kernel_used_in_two_ways(self):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                both = nn.Einsum((64, 64), use_bias=False, name="both")
                return both(both(x, "bk,kn->bn"), "bk,nk->bn")

        x = jnp.ones((2, 64))
        params = Twice().init(jax.random.key(0), x)
        with self.assertRaisesRegex(QuantizeError, r"^both/kernel: shape \(64, 64\) is used in several ways"):
            quantize(params, W4, Twice(), (x,))
        got = quantize(params, Rule("both", W4, axis=(1,)), Twice(), (x,))
        self.assertEqual(got["params"]["both"]["kernel"].axes, (1, 0))

    @parameterized.named_parameters(
        ("a model without inputs", dict(model=NET), "give inputs="),
        ("inputs without a model", dict(inputs=(IDS,)), "give model="),
        ("options without a model", dict(train=True), r"\['train'\] are for a model"),
        ("a function", dict(model=lambda x: x, inputs=(IDS,)), "a flax.linen module is wanted"),
    )
    def test_arguments_that_do_not_go_together(self, options, message):
        with self.assertRaisesRegex(QuantizeError, message):
            quantize(PARAMS, W4, **options)

    def test_where_there_are_convolutions_only_the_error_says_so(self):
        with self.assertRaisesRegex(RuleError, "matches nothing: 'conv' is a convolution, by its name$"):
            quantize({"conv": PARAMS["conv"]}, W4)

    def test_an_nnx_state_belongs_to_a_module(self):
        state = nnx.state(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        with self.assertRaisesRegex(QuantizeError, "params is an nnx State; .* by qjax.nnx.quantize"):
            quantize(state, W4)

    def test_params_are_a_mapping(self):
        with self.assertRaisesRegex(QuantizeError, "params is a list"):
            quantize([jnp.ones((64, 8))], W4)


def test_float_arrays_on_the_device_are_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {f"layer_{i}": {"kernel": np.ones((4, 256, 64), np.float32)} for i in range(3)}
    rule = Rule(".*", W4, axis=(1,), stacked=(0,))
    quantize(params, rule)  # compiles, and fills caches
    before = {id(a) for a in jax.live_arrays()}
    alive = []

    def spy(w, *args, **kwargs):
        alive.append(sum(a.size for a in jax.live_arrays() if id(a) not in before and a.dtype == jnp.float32))
        return quantize_array(w, *args, **kwargs)

    monkeypatch.setattr(flax_kernel, "quantize_array", spy)
    quantize(params, rule)
    assert len(alive) == 12 and max(alive) <= 256 * 64


def test_the_bar_counts_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(items, what, show):
        seen.append((len(items), what, show))
        return items

    monkeypatch.setattr(convert, "track", spy)
    quantize(PARAMS, W4, NET, (IDS,), progress=True)
    assert seen == [(3, "quantizing", True)]
