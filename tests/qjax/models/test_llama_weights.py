"""Tensors reach the modules that they are named for; whatever does not fit is an error."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qjax.nnx
from qjax.checkpoints import CheckpointFiles, write_folder
from qjax.checkpoints.load import load
from qjax.checkpoints.save import save
from qjax.errors import CheckpointError, ShardingError
from qjax.models import LayerWeights, Llama, LlamaConfig, dense_reader, load_llama
from qjax.nnx import QEmbed, QLinear
from qjax.quantize import quantize_array
from qjax.schemes import W8A16

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "torch_dtype": "float16",
}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def weights() -> dict[str, np.ndarray]:
    shapes = {
        "model.embed_tokens.weight": (24, 16),
        "lm_head.weight": (24, 16),
        "model.norm.weight": (16,),
        "model.layers.0.input_layernorm.weight": (16,),
        "model.layers.0.post_attention_layernorm.weight": (16,),
        f"{ATTENTION}.q_proj.weight": (16, 16),
        f"{ATTENTION}.k_proj.weight": (8, 16),
        f"{ATTENTION}.v_proj.weight": (8, 16),
        f"{ATTENTION}.o_proj.weight": (16, 16),
        f"{MLP}.gate_proj.weight": (20, 16),
        f"{MLP}.up_proj.weight": (20, 16),
        f"{MLP}.down_proj.weight": (16, 20),
        f"{ATTENTION}.q_proj.bias": (16,),
        f"{ATTENTION}.k_proj.bias": (8,),
        f"{ATTENTION}.v_proj.bias": (8,),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


class LoadTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "model"
        self.tensors = weights()

    def files(self, **config: Any) -> CheckpointFiles:
        write_folder(self.folder, tensors=self.tensors, config=CONFIG | config)
        return CheckpointFiles.open(self.folder)

    def reject(self, message: str, **config: Any) -> None:
        with self.assertRaisesRegex(CheckpointError, message):
            load_llama(self.files(**config))

    def test_each_tensor_lands_in_the_module_of_its_name(self):
        model = load_llama(self.files())
        layer = model.layers[0]
        for module, name in (
            (layer.self_attn.q_proj, f"{ATTENTION}.q_proj"),
            (layer.self_attn.v_proj, f"{ATTENTION}.v_proj"),
            (layer.mlp.down_proj, f"{MLP}.down_proj"),
            (model.lm_head, "lm_head"),
        ):
            kernel = module.kernel.get_value()
            np.testing.assert_array_equal(kernel, self.tensors[f"{name}.weight"].T)
            if f"{name}.bias" in self.tensors:
                np.testing.assert_array_equal(module.bias.get_value(), self.tensors[f"{name}.bias"])
        embedding = model.embed_tokens.embedding.get_value()
        np.testing.assert_array_equal(embedding, self.tensors["model.embed_tokens.weight"])
        norm = layer.post_attention_layernorm.weight.get_value()
        expected = self.tensors["model.layers.0.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(norm, expected)

    def test_weights_keep_the_dtype_of_the_file_and_activations_have_the_one_asked_for(self):
        files = self.files()
        for dtype in (None, jnp.float32):
            model = load_llama(files, dtype=dtype)
            self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}, {jnp.dtype("float16")})
            self.assertEqual(model.dtype, dtype or jnp.float16)

    def test_a_sharded_folder_is_the_same_model(self):
        write_folder(self.folder, tensors=self.tensors, config=CONFIG, shard_bytes=1000)
        sharded = nnx.state(load_llama(CheckpointFiles.open(self.folder)))
        self.folder = self.folder.with_name("single")
        single = nnx.state(load_llama(self.files()))
        jax.tree.map(np.testing.assert_array_equal, sharded, single)

    def test_without_a_source_of_keys_weights_are_the_shapes_of_those_that_would_be_drawn(self):
        config = LlamaConfig.from_hf(CONFIG | {"attention_bias": True}, None, where="config.json")
        drawn = nnx.eval_shape(lambda: Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.float16, rngs=nnx.Rngs(0)))
        shapes = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.float16, rngs=None)
        self.assertEqual(nnx.to_pure_dict(nnx.state(shapes)), nnx.to_pure_dict(nnx.state(drawn)))

    def test_of_two_errors_the_first_module_s_is_raised(self):
        for name in ("q_proj", "k_proj"):
            self.tensors[f"{ATTENTION}.{name}.weight"] = np.zeros((1, 1), np.float16)
        with self.assertRaisesRegex(CheckpointError, "k_proj.weight: shape"):
            load_llama(self.files())

    def test_weights_go_to_the_device_in_context(self):
        files = self.files()
        with jax.default_device(jax.devices()[1]):
            model = load_llama(files)
        devices = {device for leaf in jax.tree.leaves(nnx.state(model)) for device in leaf.devices()}
        self.assertEqual(devices, {jax.devices()[1]})

    def test_where_the_system_cannot_be_asked_to_read_ahead_the_model_is_the_same(self):
        files = self.files()
        asked = nnx.state(load_llama(files))
        with mock.patch.object(os, "RWF_NOWAIT", create=True):
            del os.RWF_NOWAIT
            unasked = nnx.state(load_llama(files))
        jax.tree.map(np.testing.assert_array_equal, unasked, asked)

    def test_end_tokens_come_from_generation_config(self):
        extra = {"generation_config.json": json.dumps({"eos_token_id": [3, 4]}).encode()}
        write_folder(self.folder, tensors=self.tensors, config=CONFIG, extra_files=extra)
        model = load_llama(CheckpointFiles.open(self.folder))
        self.assertEqual(model.config.eos_token_ids, (3, 4))

    def test_a_tied_head_needs_no_tensor_and_ignores_one(self):
        kept = load_llama(self.files(tie_word_embeddings=True))
        self.assertIsNone(kept.lm_head)
        del self.tensors["lm_head.weight"]
        self.folder = self.folder.with_name("without")
        model = load_llama(self.files(tie_word_embeddings=True), dtype=jnp.float32)
        hidden = jnp.ones((1, 16))
        expected = hidden @ self.tensors["model.embed_tokens.weight"].astype(np.float32).T
        np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-5)

    @parameterized.parameters(
        "lm_head.weight", f"{MLP}.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
    )
    def test_a_missing_tensor_is_named(self, name):
        del self.tensors[name]
        self.reject(f"'{name}' is missing")

    def test_a_missing_bias_is_named(self):
        del self.tensors[f"{ATTENTION}.k_proj.bias"]
        self.reject(rf"{ATTENTION}.k_proj.bias: missing; expected shape \[8\]")

    def test_a_bias_that_the_config_does_not_ask_for_is_refused(self):
        self.tensors[f"{MLP}.up_proj.bias"] = np.zeros(20, np.float16)
        self.reject(f"{MLP}.up_proj.bias: the config asks for no bias")

    @parameterized.parameters(
        (f"{MLP}.up_proj.weight", (16, 20), (20, 16)),
        (f"{ATTENTION}.k_proj.weight", (16, 16), (8, 16)),
        (f"{ATTENTION}.k_proj.bias", (16,), (8,)),
        ("model.norm.weight", (8,), (16,)),
        ("model.embed_tokens.weight", (16, 24), (24, 16)),
        (f"{MLP}.down_proj.weight", (320,), (16, 20)),
    )
    def test_a_mis_shaped_tensor_is_named_with_both_shapes(self, name, got, expected):
        self.tensors[name] = np.zeros(got, np.float16)
        shapes = rf"shape \[{', '.join(map(str, got))}\]; the config asks for \[{', '.join(map(str, expected))}\]"
        self.reject(f"{name}: {shapes}")

    def test_a_tensor_that_belongs_nowhere_is_named(self):
        self.tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((20, 16), np.float16)
        self.reject(r"1 tensors belong to no part of a qwen2 with 1 layers: model.layers.1.*\[20, 16\]")

    def test_a_tensor_that_belongs_nowhere_may_be_ignored_by_name(self):
        self.tensors[f"{ATTENTION}.k_scale"] = np.zeros((), np.float16)
        self.tensors[f"{ATTENTION}.rotary_emb.inv_freq"] = np.zeros(4, np.float16)
        self.reject("1 tensors belong to no part.*k_scale")
        load_llama(CheckpointFiles.open(self.folder), ignored=[r".*\.k_scale"])

    def test_quantized_tensors_are_not_taken_for_dense_ones(self):
        self.tensors[f"{MLP}.up_proj.weight"] = np.zeros((20, 16), np.int8)
        self.reject("up_proj.weight' has dtype int8; expected one of float32")
        self.folder = self.folder.with_name("packed")
        self.tensors[f"{MLP}.up_proj.qweight"] = np.zeros((20, 2), np.int32)
        self.reject(f"unexpected {MLP}.up_proj.qweight")

    def test_a_reader_supplies_what_the_dense_one_cannot_read(self):
        self.tensors = {name.replace("up_proj.weight", "up_proj.halved"): value for name, value in self.tensors.items()}
        files = self.files()
        dense = dense_reader(files)

        def reader(prefix: str) -> LayerWeights:
            if prefix.endswith("up_proj"):
                return LayerWeights(2 * files[f"{prefix}.halved"].T)
            return dense(prefix)

        kernel = load_llama(files, reader=reader).layers[0].mlp.up_proj.kernel.get_value()
        np.testing.assert_array_equal(kernel, 2 * self.tensors[f"{MLP}.up_proj.halved"].T)

    def test_a_reader_that_returns_qtensors_puts_quantized_modules_in_place(self):
        files = self.files()
        dense = dense_reader(files)

        def quantized(prefix: str) -> LayerWeights:
            weights = dense(prefix)
            kernel = jnp.asarray(np.ascontiguousarray(weights.kernel), jnp.float32)
            return LayerWeights(quantize_array(kernel, W8A16()), weights.bias)

        def rounded(prefix: str) -> LayerWeights:
            weights = quantized(prefix)
            return LayerWeights(np.asarray(weights.kernel.dequantize()), weights.bias)

        model = load_llama(files, dtype=jnp.float32, reader=quantized)
        oracle = load_llama(files, dtype=jnp.float32, reader=rounded)
        self.assertIsInstance(model.embed_tokens, QEmbed)
        self.assertIsInstance(model.lm_head, QLinear)
        q_proj = model.layers[0].self_attn.q_proj
        self.assertIsInstance(q_proj, QLinear)
        np.testing.assert_array_equal(q_proj.bias.get_value(), self.tensors[f"{ATTENTION}.q_proj.bias"])
        forward = nnx.jit(lambda model, ids: model(ids))
        ids = jnp.arange(8)[None]
        np.testing.assert_allclose(forward(model, ids), forward(oracle, ids), rtol=1e-4, atol=1e-3)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_a_mesh_cuts_the_bias_of_a_quantized_layer_as_its_outputs_are(self, kind):
        model = load_llama(self.files(), dtype=jnp.float32)
        qjax.nnx.quantize(model, "w8a16")
        saved = self.folder.with_name("quantized")
        save(model, saved, source=self.folder)
        mesh = jax.make_mesh((2, 2), ("fsdp", "model"), axis_types=(kind,) * 2)
        cut = load(saved, mesh=mesh, dtype="float32")
        q_proj = cut.layers[0].self_attn.q_proj
        self.assertEqual(q_proj.kernel.get_value().packed.sharding.spec, PartitionSpec("model", "fsdp"))
        self.assertEqual(q_proj.bias.get_value().sharding, NamedSharding(mesh, PartitionSpec("model")))
        forward = nnx.jit(lambda model, ids: model(ids))
        ids = jnp.arange(8)[None]
        np.testing.assert_allclose(forward(cut, ids), forward(model, ids), rtol=1e-4, atol=1e-3)

    def test_a_qtensor_of_the_wrong_shape_is_named_with_both(self):
        files = self.files()
        dense = dense_reader(files)

        def reader(prefix: str) -> LayerWeights:
            weights = dense(prefix)
            if not prefix.endswith("up_proj"):
                return weights
            return LayerWeights(quantize_array(jnp.ones((20, 16)), W8A16()))

        with self.assertRaisesRegex(CheckpointError, r"up_proj.weight: shape \[16, 20\]; .* \[20, 16\]"):
            load_llama(files, reader=reader)

    def test_a_mesh_that_does_not_divide_a_weight_is_named(self):
        mesh = jax.make_mesh((8,), ("model",))
        with self.assertRaisesRegex(ShardingError, "mlp.*20 cannot be cut into 8 .* 'model'"):
            load_llama(self.files(), mesh=mesh)

    def test_host_memory_holds_the_model_and_no_copy_of_a_tensor(self):
        self.tensors["lm_head.weight"] = np.zeros((50_000, 16), np.float16)
        self.tensors["model.embed_tokens.weight"] = np.zeros((50_000, 16), np.float16)
        files = self.files(vocab_size=50_000)
        load_llama(files)
        tracemalloc.start()
        load_llama(files)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A CPU's model is memory of the host: two large tensors, and half of one for all else.
        self.assertLess(peak, 2.5 * self.tensors["lm_head.weight"].nbytes)
