"""What calibration is worth on a real model: perplexity and KL over 40 windows of held-out text.

Targets are those of an independent implementation in PyTorch (`references.md` beside the model) and ours.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
import qjax.nnx
from qjax.calibration import windows
from qjax.explain import layers
from qjax.models import perplexity

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
BASE = 10.855397


@pytest.fixture(scope="module")
def texts() -> tuple[list[np.ndarray], list[int]]:
    """What is calibrated on, and what is measured on."""
    tokenizer = qjax.load_tokenizer(PYLM)
    calib, held_out = (
        tokenizer.encode((PYLM / name).read_text(encoding="utf-8"), add_special_tokens=False)
        for name in ("calib.txt", "eval.txt")
    )
    return windows(calib), held_out


# scheme, recipe, most bytes, most perplexity in % over the base, most KL
CASES = [
    ("w4a16:symmetric=false", "gptq", 1_683_456, 2.5, 0.0340),
    ("w4a16", "gptq:passes=4,outputs=float", 1_671_168, 2.2, 0.0320),
    ("w4a16:symmetric=false", "gptq:order=static,passes=4,outputs=float", 1_683_456, 2.0, 0.0290),
    ("w3a16", "gptq:order=static,passes=4,outputs=float", 1_287_168, 8.0, 0.1200),
    ("w4a16:symmetric=false", "awq", 1_683_456, 3.9, 0.0469),
    ("w4a16:symmetric=false", "mse", 1_646_592, 4.0, 0.0470),
    ("w4a16:symmetric=false", "hqq", 1_671_168, 4.6, 0.0480),
    ("w8a8_int8", "smoothquant", 3_186_688, 0.25, 0.0018),
]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "recipe", "most_bytes", "most_change", "most_kl"), CASES)
def test_a_recipe_keeps_what_it_did_for_a_real_model(texts, scheme, recipe, most_bytes, most_change, most_kl):
    calib, held_out = texts
    model = qjax.calibrate(qjax.load(PYLM), calib, recipe, scheme)
    found = perplexity(model, held_out, base=qjax.load(PYLM), max_windows=40)
    assert 100 * (found.perplexity / BASE - 1) < most_change
    assert found.kl < most_kl
    assert sum(layer.kernel.nbytes for layer in layers(model) if layer.name == "kernel") <= most_bytes


@pytest.mark.slow
def test_smoothquant_is_worth_it_where_four_channels_are_thirty_times_as_large(texts):
    calib, held_out = texts

    def outlying():
        """The same model: norms put four channels out 30 times as large, and the layers behind take it back."""
        model = qjax.load(PYLM, dtype="float32")
        factors = jnp.ones(256).at[jnp.array([3, 70, 129, 200])].set(30.0)
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, behind in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight.set_value(norm.weight[...].astype(jnp.float32) * factors)
                for linear in behind:
                    linear.kernel.set_value(linear.kernel[...].astype(jnp.float32) / factors[:, None])
        return model

    base = qjax.load(PYLM, dtype="float32")
    plain = perplexity(qjax.nnx.quantize(outlying(), "w8a8_int8"), held_out, base=base, max_windows=8)
    smooth = qjax.calibrate(outlying(), calib[:2], "smoothquant", "w8a8_int8")
    found = perplexity(smooth, held_out, base=base, max_windows=8)
    assert found.kl < 0.5 * plain.kl
    assert found.perplexity < plain.perplexity
