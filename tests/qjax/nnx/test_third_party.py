"""An unmodified model of an installed package, quantized in two lines."""

import chex
import jax
import mamba2_jax
from flax import nnx

import qjax.nnx


def test_mamba2_runs_on_quantized_projections() -> None:
    config = mamba2_jax.Mamba2Config.tiny()
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, config.vocab_size)
    logits = model(tokens)["logits"]
    qjax.nnx.quantize(model, qjax.W8A16())
    swapped = [path[-1] for path, m in nnx.iter_modules(model) if isinstance(m, qjax.nnx.QLinear)]
    assert swapped == ["in_proj", "out_proj"] * config.num_hidden_layers
    quantized = mamba2_jax.forward(model, tokens)["logits"]
    spread = logits.std()
    chex.assert_trees_all_close(quantized / spread, logits / spread, atol=0.1)
    assert abs(quantized - logits).max() > 0
