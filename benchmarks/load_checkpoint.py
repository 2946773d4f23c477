"""How fast does a checkpoint load, against reading its bytes?

Makes a Llama of the shape of a 7B model with random codes in a folder of its own (3.6 GB of 4 bits at 32 layers), reads
its file to the end and loads it, in turns, several times: with the file in the page cache, and from the disk (on Linux,
which drops it on request). A file is read twice: into one small buffer over and over, and into memory of its own, which
is what a model needs too and which the system has to clear first. Prints a JSON object a format; `--output` keeps them
in a file beside those of other revisions.

    python -m benchmarks.load_checkpoint --formats gptq,awq --layers 32
    python -m benchmarks.load_checkpoint --layers 4 --commit REVISION --output benchmarks/results/load-cpu.json
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

import qjax
from qjax.bench.machine import describe_machine
from qjax.checkpoints.write import write_folder
from qjax.explain import layers
from qjax.formats import FORMATS

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
    "fp8": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
BLOCK = 64  # of NF4


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random 4-bit codes, eight a word."""
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)


def linear(rng: np.random.Generator, form: str, n: int, k: int) -> dict[str, np.ndarray]:
    """The tensors of one Linear."""
    groups = k // GROUP
    if form == "fp8":
        codes = rng.integers(0, 0x7F, (n, k), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": np.full((n // GROUP, groups), 0.01, np.float32)}
    if form == "nf4":
        state = dict(quant_type="nf4", blocksize=BLOCK, dtype="float16", shape=[n, k])
        return {
            "weight": words(rng, n * k // 8).view(np.uint8).reshape(-1, 1),
            "weight.absmax": np.full(n * k // BLOCK, 0.01, np.float32),
            "weight.quant_map": np.array(FORMATS["nf4"].codebook, np.float32),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
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


class Seconds(NamedTuple):
    """What one way took."""

    best: float
    median: float


def read_seconds(file: Path) -> float:
    """To read a file into one buffer that is there already."""
    buffer = np.zeros(1 << 26, np.uint8)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer.data):
            pass
    return time.perf_counter() - start


def keep_seconds(file: Path) -> float:
    """To read a file into new memory."""
    start = time.perf_counter()
    np.fromfile(file, np.uint8)
    return time.perf_counter() - start


def load_seconds(file: Path) -> float:
    """To load the folder of a file."""
    start = time.perf_counter()
    model = qjax.load(file.parent)
    jax.block_until_ready([layer.kernel for layer in layers(model)])
    return time.perf_counter() - start


def from_disk(measure: Callable[[Path], float]) -> Callable[[Path], float]:
    """The same with the file out of the page cache."""

    def measured(file: Path) -> float:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return measure(file)

    return measured


def processor(measure: Callable[[Path], float]) -> Callable[[Path], float]:
    """The same in seconds of processors: what a busy machine does to the other figure, it does not do to this one."""

    def measured(file: Path) -> float:
        start = time.process_time()
        measure(file)
        return time.process_time() - start

    return measured


def measure(form: str, count: int, repeat: int) -> dict[str, Any]:
    """One record."""
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "model", form, count)
        file = Path(root) / "model" / "model.safetensors"
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # else the system would not drop it
        size = file.stat().st_size

        def each_in_turn(*measures: Callable[[Path], float]) -> list[Seconds]:
            rounds = [[measure(file) for measure in measures] for _ in range(repeat)]
            return [Seconds(min(seconds), median(seconds)) for seconds in zip(*rounds, strict=True)]

        first = load_seconds(file)
        work = min(processor(load_seconds)(file) for _ in range(repeat))
        cached = each_in_turn(read_seconds, keep_seconds, load_seconds)
        cold = each_in_turn(*map(from_disk, (read_seconds, keep_seconds, load_seconds)))
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "format": form,
        "layers": count,
        "file_bytes": size,
        "first_load_gb_s": size / first / 1e9,
        "load_gb_per_processor_s": size / work / 1e9,
        **_speeds("", size, *cached),
        **_speeds("disk_", size, *cold),
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
    }


def _speeds(where: str, size: int, read: Seconds, keep: Seconds, load: Seconds) -> dict[str, float]:
    """GB/s at best, loading's share of the readings at best, and of the readings between which it was."""
    found = {f"{where}{name}_gb_s": size / s.best / 1e9 for name, s in (("read", read), ("keep", keep), ("load", load))}
    for name, reading in (("read", read), ("keep", keep)):
        found[f"{where}load_to_{name}"] = reading.best / load.best
        found[f"{where}load_to_{name}_median"] = reading.median / load.median
    return found


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--commit", help="the revision that is measured")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where records are kept")
    args = parser.parse_args()
    for form in args.formats.split(","):
        record = {"op": "load", "commit": args.commit} | measure(form, args.layers, args.repeat)
        print(json.dumps(record), flush=True)
        if args.output is not None:
            keep(args.output, record)


def keep(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to a file, in place of one of the same revision and format."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": describe_machine(), "records": []}
    others = [r for r in found["records"] if (r["commit"], r["format"]) != (record["commit"], record["format"])]
    lines = ",\n".join(json.dumps(r) for r in [*others, record])
    path.write_text(f'{{"machine": {json.dumps(found["machine"])},\n"records": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
