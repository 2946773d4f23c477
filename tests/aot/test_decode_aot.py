"""A block of decode steps as XLA compiles it for a GPU that is not there: graphs, and nothing that moves weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot.compiler import PACKAGES, missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, [PACKAGES, tests.parent, tests]))
    command = [sys.executable, str(Path(__file__).with_name("decode_program.py"))]
    env = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_step_has_no_launch_outside_of_the_graph(program):
    """The loop and its condition are outside: XLA knows how often it turns and asks nobody."""
    outside = [step for step in program["steps"] if not step["in_graph"]]
    assert [step["kind"] for step in outside] == ["kWhile", "kCustomKernel"], outside
    assert "compare" in outside[1]["name"]
    assert '"known_trip_count":{"n":"8"}' in program["hlo"]


def test_no_step_copies_codes_or_the_cache(program):
    body = max(re.findall(r"(?s)\n%[\w.]*region[^\n]*\{\n(.*?)\n\}", program["hlo"]), key=len)
    assert "u32[12288,32,16]" in body, "the merged weight of q, k and v is read in the loop"
    copies = re.findall(r"= (\w+)\[([\d,]+)\]\S* (?:copy|transpose)\(", body)
    large = [(dtype, dims) for dtype, dims in copies if dtype == "u32" or dims.count(",") == 3]
    assert not large, large
