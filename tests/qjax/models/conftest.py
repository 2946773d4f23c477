"""The real model of the examples, loaded once, and a small Llama with made-up weights."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.checkpoints import CheckpointFiles
from qjax.models import Llama, LlamaConfig, load_llama
from qjax.models.rope import Rope

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"


@pytest.fixture(scope="session")
def pylm_folder() -> Path:
    return PYLM


@pytest.fixture(scope="session")
def pylm() -> Llama:
    """In float32, with the file's bfloat16 weights."""
    return load_llama(CheckpointFiles.open(PYLM), dtype=jnp.float32)


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    """What an implementation in PyTorch computed for it; see the folder's references.md."""
    return dict(np.load(PYLM / "reference_logits.npz"))


@pytest.fixture(scope="session")
def small() -> Llama:
    """One layer, 32 tokens, 64 positions, random weights."""
    config = LlamaConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        rope=Rope("default", 10000.0, 8, 64),
    )
    return Llama(config, rngs=nnx.Rngs(0))
