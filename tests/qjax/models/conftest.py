"""The real model of the examples, loaded once, and a small Llama with made-up weights."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_llama import small_llama

from qjax.checkpoints import CheckpointFiles
from qjax.models import Llama, load_llama

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
    """One layer, 32 tokens, 64 positions."""
    return small_llama()
