"""Loading holds the model and one tensor at a time: measured, in a process of its own, on one device and on four."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qjax.checkpoints.write import write_folder

HIDDEN, INNER, LAYERS = 1024, 2816, 12
LARGEST = HIDDEN * INNER // 2
LAYER = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) // 2
SLACK = 16 << 20  # of allocators and of what JAX remembers

CHILD = """
import gc, sys, threading, time
import jax
from flax import nnx
import qjax

count = int(sys.argv[2])
if count > 1:
    jax.config.update("jax_num_cpu_devices", count)
mesh = jax.make_mesh((count,), ("model",)) if count > 1 else None

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def on_devices():
    return sum(array.nbytes for array in jax.live_arrays())

qjax.load(sys.argv[1], mesh=mesh)  # imports
gc.collect()
before, host, device, done = anonymous(), 0, 0, False

def watch():
    global host, device
    while not done:
        host, device = max(host, anonymous()), max(device, on_devices())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = qjax.load(sys.argv[1], mesh=mesh)
done = True
thread.join()
print(host - before, device, sum(array.nbytes for array in jax.tree.leaves(nnx.state(model))))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ Llama of random codes."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, n: int, k: int) -> None:
        tensors[f"{name}.qweight"] = rng.integers(0, 2**31, (k // 8, n), dtype=np.int32)
        tensors[f"{name}.qzeros"] = np.full((k // 128, n // 8), 0x77777777, np.int32)
        tensors[f"{name}.scales"] = np.full((k // 128, n), 0.01, np.float16)

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            add(f"{prefix}.self_attn.{name}_proj", HIDDEN, HIDDEN)
        for name, n, k in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
            add(f"{prefix}.mlp.{name}_proj", n, k)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(HIDDEN, np.float16)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float16)
    tensors["model.embed_tokens.weight"] = np.zeros((256, HIDDEN), np.float16)
    config = dict(model_type="llama", vocab_size=256, hidden_size=HIDDEN, intermediate_size=INNER)
    config |= dict(
        num_hidden_layers=LAYERS, num_attention_heads=8, max_position_embeddings=64, tie_word_embeddings=True
    )
    config |= dict(quantization_config=dict(quant_method="gptq", bits=4, group_size=128, sym=True))
    path = tmp_path_factory.mktemp("memory") / "model"
    write_folder(path, tensors=tensors, config=config)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_loading_takes_the_model_and_little_beside_it(folder: Path, devices: int) -> None:
    command = [sys.executable, "-c", CHILD, str(folder), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    host, device, result = map(int, done.stdout.split())
    assert host <= result + 4 * LARGEST + SLACK, f"{host:,} bytes of the host for a model of {result:,}"
    assert device <= result + LAYER, f"{device:,} bytes of devices for a model of {result:,}"
