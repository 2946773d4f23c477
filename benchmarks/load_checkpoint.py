"""How fast does a 4-bit checkpoint load, against reading its bytes?

Makes a Llama of the shape of a 7B model with random codes in a folder of its own (3.9 GB at 32 layers), reads the file
once to the end, loads it, and prints one JSON object: gigabytes a second of both, their ratio, and device memory.

    python benchmarks/load_checkpoint.py --format gptq --layers 32
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qjax
from qjax.checkpoints.write import write_folder
from qjax.explain import layers

HIDDEN, INNER, HEADS, VOCABULARY, GROUP = 4096, 11008, 32, 32000, 128
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
GROUPS = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP}}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True},
    "gptq-act-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "packed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUPS}},
}


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random 4-bit codes, eight a word."""
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)


def linear(rng: np.random.Generator, form: str, n: int, k: int) -> dict[str, np.ndarray]:
    """The tensors of one Linear."""
    groups = k // GROUP
    if form == "packed":
        scale = np.full((n, groups), 0.01, np.float16)
        return {"weight_packed": words(rng, n, k // 8), "weight_scale": scale, "weight_shape": np.array([n, k])}
    codes = words(rng, k, n // 8) if form == "awq" else words(rng, k // 8, n)
    zeros = np.full((groups, n // 8), 0x77777777, np.int32)
    tensors = {"qweight": codes, "qzeros": zeros, "scales": np.full((groups, n), 0.01, np.float16)}
    if form.startswith("gptq"):
        index = (np.arange(k) // GROUP).astype(np.int32)
        tensors["g_idx"] = rng.permutation(index) if form == "gptq-act-order" else index
    return tensors


def write(folder: Path, form: str, count: int) -> None:
    """A model of `count` layers."""
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": np.zeros((VOCABULARY, HIDDEN), np.float16)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float16)
    for layer in range(count):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float16)
        for name, (n, k) in LINEARS.items():
            made = linear(rng, form, n, k)
            tensors |= {f"model.layers.{layer}.{name}.{rest}": array for rest, array in made.items()}
    config = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER)
    config |= dict(num_hidden_layers=count, num_attention_heads=HEADS, max_position_embeddings=2048)
    config |= dict(tie_word_embeddings=True, torch_dtype="float16", quantization_config=SETTINGS[form])
    write_folder(folder, tensors=tensors, config=config, shard_bytes=2**62)


def read_seconds(file: Path) -> float:
    """To read a file into one buffer that is there already."""
    buffer = np.zeros(1 << 26, np.uint8)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer.data):
            pass
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=tuple(SETTINGS), default="gptq")
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "model", args.format, args.layers)
        file = Path(root) / "model" / "model.safetensors"
        size = file.stat().st_size
        reading = min(read_seconds(file) for _ in range(2))
        seconds = []
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            model = qjax.load(file.parent)
            jax.block_until_ready([layer.kernel for layer in layers(model)])
            seconds.append(time.perf_counter() - start)
        result = sum(layer.kernel.nbytes for layer in layers(model))
    memory = jax.devices()[0].memory_stats() or {}
    found = {
        "format": args.format,
        "device": jax.devices()[0].device_kind,
        "file_bytes": size,
        "read_gb_s": size / reading / 1e9,
        "first_load_gb_s": size / seconds[0] / 1e9,
        "load_gb_s": size / seconds[1] / 1e9,
        "load_to_read": reading / seconds[1],
        "kernel_bytes": result,
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
