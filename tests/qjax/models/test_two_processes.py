"""Two processes, each with devices of its own, write the text that one writes: `jax.distributed` on one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import qjax
import qjax.nnx
from qjax.models import generate, merge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCHEME = "w4a16:group_size=32"
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]

PROGRAM = f"""
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import qjax, qjax.nnx
from qjax.models import generate, merge
mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType[sys.argv[4]],))
model = merge(qjax.nnx.quantize(qjax.load(sys.argv[3], mesh=mesh), {SCHEME!r}))
kernel = model.layers[0].mlp.down_proj.kernel.get_value()
assert 4 * kernel.packed.addressable_shards[0].data.size == kernel.packed.size
print(json.dumps([jax.process_count(), generate(model, {PROMPTS}, max_new_tokens=12)]))
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_two_processes_of_two_devices_write_what_one_writes(kind: str, pylm_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(process), str(pylm_folder), kind],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors[-2000:] for _, errors in said)
    alone = generate(merge(qjax.nnx.quantize(qjax.load(pylm_folder), SCHEME)), PROMPTS, max_new_tokens=12)
    for text, _ in said:
        assert json.loads(text.splitlines()[-1]) == [2, alone]  # after what the collectives say
