"""config.json becomes a complete LlamaConfig, or an error that names file and key."""

from typing import Any

from absl.testing import parameterized

from qjax.errors import CheckpointError
from qjax.models import LlamaConfig
from qjax.models.rope import Rope

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    """BASE with changes; a change to ... removes the key."""
    config = {k: v for k, v in (BASE | changes).items() if v is not ...}
    return LlamaConfig.from_hf(config, generation, where="m/config.json")


class ConfigTest(parameterized.TestCase):
    def test_what_the_file_leaves_out_has_the_defaults_of_transformers(self):
        config = read()
        self.assertEqual((config.head_dim, config.num_key_value_heads), (8, 4))
        self.assertEqual((config.rms_norm_eps, config.hidden_act), (1e-6, "silu"))
        self.assertEqual(config.rope, Rope("default", 10000.0, 8, 128))
        self.assertEqual((config.bos_token_id, config.eos_token_ids), (1, (2,)))
        self.assertEqual(config.sliding_windows, (None, None, None))
        self.assertFalse(config.tie_word_embeddings or config.qkv_bias or config.mlp_bias)
        self.assertEqual(config.dtype, "float32")

    def test_null_is_the_same_as_missing(self):
        self.assertEqual(read(head_dim=None, rope_scaling=None, num_key_value_heads=None), read())

    def test_it_is_hashable(self):
        self.assertEqual(hash(read()), hash(read()))

    @parameterized.parameters(
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("mistral", {"attention_bias": True}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, True)),
    )
    def test_families_differ_in_biases_and_head_norms(self, family, changes, expected):
        config = read(model_type=family, **changes)
        self.assertEqual((config.qkv_bias, config.o_bias, config.qk_norm), expected)

    def test_qwen3_heads_are_128_wide_unless_stated(self):
        self.assertEqual(read(model_type="qwen3").head_dim, 128)

    @parameterized.parameters(
        ("mistral", {}, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 9}, (9, 9, 9)),
        ("llama", {"sliding_window": 9}, (None, None, None)),
        ("qwen2", {"sliding_window": 9}, (None, None, None)),
        (
            "qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 9),
        ),
        (
            "qwen3",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, None, 9),
        ),
    )
    def test_windows_are_resolved_for_each_layer(self, family, changes, expected):
        self.assertEqual(read(model_type=family, **changes).sliding_windows, expected)

    @parameterized.parameters(
        (None, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": [7]}, {"eos_token_id": 5}, (7,)),
        ({"temperature": 1.0}, {"eos_token_id": 5}, (5,)),
    )
    def test_generation_config_has_the_last_word_on_end_tokens(self, generation, changes, expected):
        self.assertEqual(read(generation, **changes).eos_token_ids, expected)

    @parameterized.parameters("dtype", "torch_dtype")
    def test_the_dtype_is_read_under_its_new_and_its_old_name(self, key):
        self.assertEqual(read(**{key: "bfloat16"}).dtype, "bfloat16")

    @parameterized.parameters(
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    )
    def test_positions_are_stretched_where_the_config_states_the_original(self, scaling, positions):
        self.assertEqual(read(rope_scaling=scaling).max_positions, positions)

    def test_yarn_infers_its_factor_from_the_two_lengths(self):
        rope = read(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 32}).rope
        self.assertEqual((rope.factor, rope.original_positions), (4.0, 32))
        self.assertAlmostEqual(rope.attention_factor, 1.1386294361)  # 0.1 ln 4 + 1

    @parameterized.parameters(*(key for key in BASE))
    def test_a_missing_key_is_named(self, key):
        with self.assertRaisesRegex(CheckpointError, f"m/config.json: key '{key}' is missing"):
            read(**{key: ...})

    @parameterized.parameters(
        ({"vocab_size": "64"}, "vocab_size='64'; expected an integer, at least 1"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*that divide the heads"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1; expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; expected true or false"),
        ({"rope_scaling": 3}, "rope_scaling=3; expected an object or null"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "key 'short_factor' is missing; .* 4 numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'; expected a token id or a list"),
        ({"model_type": 3}, "model_type=3; expected one of llama, mistral, qwen2, qwen3"),
    )
    def test_a_value_that_no_model_has_is_named(self, changes, message):
        with self.assertRaisesRegex(CheckpointError, f"m/config.json.*{message}"):
            read(**changes)

    @parameterized.parameters(
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported: llama, mistral"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu'"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope_type='axial'.*supported: default, linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    )
    def test_a_lawful_config_that_is_not_served_says_what_is(self, changes, message):
        with self.assertRaisesRegex(NotImplementedError, message):
            read(**changes)
