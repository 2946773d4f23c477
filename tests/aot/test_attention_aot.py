"""Attention of one token compiles for GPUs that are not there: no spills, within shared memory, in a CUDA graph."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot.compiler import PACKAGES, missing

from qjax.devices import find_device

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow

DEVICES = ("A100", "L4", "H200", "B200")
CASES = (
    "llama-2-7b", "llama-3-8b", "gemma-2-9b", "odd heads", "many queries", "int8 cache", "int8 cache; few queries",
    "fp8 cache", "fp8 cache; own", "many rows", "float32",
)  # fmt: skip
PAIRS = [(c, d) for c in CASES for d in DEVICES if not ("fp8" in c and d == "A100")]  # which has no FP8


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, [PACKAGES, tests.parent, tests]))
    command = [sys.executable, str(Path(__file__).with_name("attention_programs.py")), *map(",".join, PAIRS)]
    env = os.environ | {
        "PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2",
        "LLVM_DISABLE_SYMBOLIZATION": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("case", "device"), PAIRS)
def test_it_is_at_most_two_kernels_without_spills(case: str, device: str, reports: dict[str, Any]) -> None:
    report = reports[f"{case} {device}"]
    assert not report["error"], report["error"]
    local = [k["name"] for k in report["kernels"] if k["spills"] or k["stack"]]
    assert not local, local
    limit = find_device(device).shared.smem_block
    assert all(step["shared"] <= limit for step in report["steps"])
    assert all(step["in_graph"] for step in report["steps"])
    assert len([step for step in report["steps"] if step["kind"] != "kCopy"]) <= 2, "copies: nothing is donated here"
