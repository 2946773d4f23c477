"""Headers, configs and settings in which anything may have become anything: an error of ours, or a model; no crash.

Memory is bounded while these run, so that an allocation which a file made up fails.
"""

import copy
import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

import qjax
from qjax.checkpoints.weights import read_weights
from qjax.errors import QJaxError

SMALL = Path(__file__).parents[2] / "data" / "checkpoints"
ROUNDS = 40
SPARE = 4 << 30

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3, 64, 2**31, 2**40, 2**63, -(2**63), 1.5, float("nan"), float("inf"),
    "", "x", "1", "Linear", "re:.*", "re:(", "re:(a+)+b", "gptq", "gptq_v2", "gemv", "group", "channel", "tensor",
    "block", "int", "float", "pack-quantized", "float-quantized", "nvfp4-pack-quantized", "mixed-precision",
    [], [1], [[]], ["x"], [2**40, 2**40], {}, {"a": 1},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with one to three of its parts gone or changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        *above, last = rng.choice(found)
        part = value
        for key in above:
            part = part[key]
        if rng.random() < 0.2:
            del part[last]
        else:
            part[last] = copy.deepcopy(rng.choice(VALUES))
    return value


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def survives(read: Callable[[Path], Any], folder: Path, what: str) -> None:
    try:
        read(folder)
    except (QJaxError, NotImplementedError) as error:
        assert str(error), what


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """config.json, the header of model.safetensors, and its data."""
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads((folder / "config.json").read_text()), json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(folder: Path, config: Any, header: bytes, data: bytes) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture(params=["gptq-4b-g128", "bnb-nf4"])
def small(request: pytest.FixtureRequest) -> Path:
    return SMALL / request.param


def test_any_config_loads_or_is_refused(small: Path, tmp_path: Path) -> None:
    config, header, data = parts(small)
    for seed in range(ROUNDS):
        changed = mutated(config, random.Random(seed))
        put(tmp_path, changed, json.dumps(header).encode(), data)
        survives(qjax.load, tmp_path, str(changed))


def test_any_header_loads_or_is_refused(small: Path, tmp_path: Path) -> None:
    config, header, data = parts(small)
    for seed in range(ROUNDS):
        changed = mutated(header, random.Random(seed))
        put(tmp_path, config, json.dumps(changed).encode(), data)
        survives(qjax.load, tmp_path, str(changed))


def test_any_bytes_in_a_header_load_or_are_refused(small: Path, tmp_path: Path) -> None:
    raw = (small / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(end)] = rng.randrange(256)
        (tmp_path / "model.safetensors").write_bytes(changed)
        survives(qjax.load, tmp_path, f"seed {seed}")


FORMATS: dict[str, tuple[Callable[..., foreign.Foreign], dict[str, Any]]] = {
    "gptq": (foreign.gptq, dict(bits=4, n=32, k=64, group=32, index="random")),
    "awq": (foreign.awq, dict(n=32, k=64, group=32)),
    "packed": (foreign.ct_packed, dict(bits=3, n=32, k=64, group=32, symmetric=False)),
    "float": (foreign.ct_float, dict(n=130, k=130, strategy="block")),
    "fp8": (foreign.fp8, dict(n=130, k=130)),
    "bnb": (foreign.bnb, dict(n=16, k=64, nested=True)),
    "hqq": (foreign.hqq, dict(bits=4, n=16, k=64, group=32, axis=1)),
}


@pytest.mark.parametrize(("make", "options"), FORMATS.values(), ids=FORMATS)
def test_any_settings_of_a_format_are_read_or_refused(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    made = make(np.random.default_rng(0), **options)
    config, header, data = parts(foreign.write(tmp_path / "made", made))
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        settings = mutated(config["quantization_config"], rng) if rng.random() < 0.7 else config["quantization_config"]
        changed = bytearray(data)
        for _ in range(rng.randint(0, 20)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        put(tmp_path, {"quantization_config": settings}, json.dumps(header).encode(), bytes(changed))
        survives(read_weights, tmp_path, f"seed {seed}: {settings}")
