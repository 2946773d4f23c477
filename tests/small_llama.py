"""A small Llama with made-up weights."""

from typing import Any

from flax import nnx

from qjax.models import Llama, LlamaConfig
from qjax.models.rope import Rope


def small_llama(hidden: int = 16, layers: int = 1, heads: int = 2, **options: Any) -> Llama:
    """32 tokens, 64 positions, two heads of queries for one of keys and values; `options` of its config."""
    config = LlamaConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=64,
        rope=Rope("default", 10000.0, hidden // heads, 64),
        **options,
    )
    return Llama(config, rngs=nnx.Rngs(0))
