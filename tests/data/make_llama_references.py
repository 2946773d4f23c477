"""Writes llama_references.json and .npz: what `transformers` computes for small models of each kind.

Run apart from the project's environment (torch 2.13 on the CPU, transformers 5.23):

    python make_llama_references.py

The weights are not stored: each tensor is drawn from a generator seeded with its name, here and in
the tests alike. The JSON holds each case's config.json and tensor shapes, the archive its token ids
and float32 logits.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
SHAPE = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def rope(kind: str, **fields: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **fields}}


LONG = dict(
    original_max_position_embeddings=16,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[1.5 + 0.5 * i for i in range(8)],
)

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama_biases_tied": (
        "llama",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama_gelu": ("llama", dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-5)),
    "llama_linear": ("llama", rope("linear", factor=3.0)),
    "llama_dynamic": ("llama", dict(max_position_embeddings=16) | rope("dynamic", factor=2.0)),
    "llama_llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_yarn": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0),
    ),
    "llama_yarn_mscale": (
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=0.4,
            truncate=False,
        ),
    ),
    "llama_longrope": ("llama", rope("longrope", factor=4.0, **LONG)),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral_no_window": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3_bias": ("qwen3", dict(attention_bias=True)),
    "gemma2": (
        "gemma2",
        dict(sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma2_uncapped": (
        "gemma2",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=True),
    ),
    "gemma3": ("gemma3_text", dict(sliding_window=5, num_hidden_layers=7, tie_word_embeddings=True)),
    "gemma3_types": (
        "gemma3_text",
        dict(sliding_window=7, layer_types=["full_attention", "sliding_attention"], query_pre_attn_scalar=24),
    ),
}


def fill(model: torch.nn.Module) -> dict[str, list[int]]:
    """Draw every stored tensor from its name; return their shapes."""
    shapes = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = np.random.RandomState(zlib.crc32(name.encode()))
            values = random.standard_normal(tuple(parameter.shape)) * 0.4
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
            shapes[name] = list(parameter.shape)
    return shapes


def main() -> None:
    import transformers

    cases, arrays = {}, {}
    for case, (model_type, fields) in CASES.items():
        config = AutoConfig.for_model(model_type, **(SHAPE | fields))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        shapes = fill(model.eval())
        for length in (12, 40):
            ids = np.random.RandomState(length).randint(0, 32, (2, length))
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)).logits
            arrays[f"{case}/ids{length}"] = ids.astype(np.int32)
            arrays[f"{case}/logits{length}"] = logits.numpy()[:, [0, length // 2, length - 1]]
        cases[case] = {"config": json.loads(config.to_json_string()), "tensors": shapes}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "llama_references.json").write_text(json.dumps(versions | {"cases": cases}) + "\n")
    np.savez_compressed(HERE / "llama_references.npz", **arrays)
    print(f"{len(cases)} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
