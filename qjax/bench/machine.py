"""What a result was measured on: the device, its measured ceilings, versions, and the revision of the code."""

import importlib.metadata
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend

import qjax
from qjax import devices
from qjax.bench.operands import random_array

REPEATS = 20  # calls in a run: the host is far ahead of the device by then
RUNS = 9


def describe_machine() -> dict[str, Any]:
    """The device at hand: names, versions, copy bandwidth (bytes a second) and bf16 rate (operations a second)."""
    here, device = jax.devices()[0], devices.current()
    on_gpu = here.platform == "gpu"
    found = {"gpu": here.device_kind} if on_gpu else {"processor": processor()}
    found |= {"device": device.name}
    found |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    cuda = re.search(r"cuda (\d+)(\d\d)0\b", backend.get_backend().platform_version)
    if cuda is not None:
        found["cuda"] = f"{cuda[1]}.{int(cuda[2])}"
    return {
        **found,
        "qjax": qjax.__version__,
        "bandwidth": copy_bandwidth(2**31 if on_gpu else 2**26),
        "bf16_rate": bf16_rate(8192 if on_gpu else 256),
    }


def revision() -> str | None:
    """The commit that this package lies in, with `-dirty` where files differ from it; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return None
    return done.stdout.strip()


def processor() -> str:
    """What the processor calls itself."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def copy_bandwidth(size: int) -> float:
    """Bytes read and written a second while `size` bytes are copied, with one added so that XLA cannot skip it.

    On a CPU they are written where they lie: new memory costs a page fault each 4 KiB.
    """
    array = jnp.zeros(size // 4, jnp.uint32)
    add = jax.jit(lambda a: a + 1, donate_argnums=(0,) if jax.default_backend() == "cpu" else ())

    def copy() -> jax.Array:
        nonlocal array
        array = add(array)
        return array

    return 2 * array.nbytes / _seconds(copy)


def bf16_rate(side: int) -> float:
    """Operations a second of a square product of random bfloat16 matrices, a multiply and an add being two."""
    a, b = (random_array(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    return 2 * side**3 / _seconds(jax.jit(jnp.dot), a, b)


def _seconds(call: Callable[..., jax.Array], *args: jax.Array) -> float:
    """The median over runs of a call's share of a run."""
    found = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        for _ in range(REPEATS):
            y = call(*args)
        y.block_until_ready()
        found.append((time.perf_counter() - started) / REPEATS)
    return statistics.median(found[1:])
