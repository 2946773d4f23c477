"""A block of decode steps as XLA compiles it for a GPU that is not there: graphs, and nothing that moves weights."""

import math
import re
from typing import Any

import pytest
from aot.compiler import answer_of, missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return answer_of("decode_program.py")


@pytest.fixture(scope="module")
def program(programs: dict[str, Any]) -> dict[str, Any]:
    return programs["one"]


def test_a_step_has_no_launch_outside_of_the_graph(program):
    """The loop and its condition are outside: XLA knows how often it turns and asks nobody."""
    outside = [step for step in program["steps"] if not step["in_graph"]]
    assert [step["kind"] for step in outside] == ["kWhile", "kCustomKernel"], outside
    assert "compare" in outside[1]["name"]
    assert '"known_trip_count":{"n":"8"}' in program["hlo"]


def test_no_step_copies_codes_or_the_cache(program):
    body = max(re.findall(r"(?s)\n%[\w.]*region[^\n]*\{\n(.*?)\n\}", program["hlo"]), key=len)
    assert "u32[12288,32,16]" in body, "the merged weight of q, k and v is read in the loop"
    assert "bf16[1,32,64,128]" in body, "the cache is in the loop"
    copies = re.findall(r"= (\w+)\[([\d,]+)\]\S* (?:copy|transpose|copy-start)\(", program["hlo"])
    large = [(dtype, dims) for dtype, dims in copies if dtype == "u32" or dims.count(",") == 3]
    assert not large, large
    moving = {"transpose", "scatter", "dynamic-update-slice"}
    moved = re.findall(r"= bf16\[1,32,64,128\]\S* ([\w-]+)\(", program["hlo"])
    assert not moving & set(moved), moved


def test_a_layer_of_one_row_is_two_calls(program):
    """From one attention to the next: it, and one call that launches four products ahead of one another."""
    assert "mosaic_gpu.uses_pdl" in program["hlo"]
    steps = program["steps"]
    first, second = (i for i, step in enumerate(steps) if step["name"] == "qjax_decode_attention")
    layer = steps[first:second]
    assert sum(step["kind"] == "kCustomCall" for step in layer) == 1
    # XLA puts what belongs to the head between layers at times.
    assert len([step for step in layer if step["name"] != "loop_maximum_fusion"]) <= 2, layer


def test_on_two_gpus_a_layer_sums_twice_and_no_weight_moves(programs):
    """Of one row: what o and down leave, in each of two layers; the token's row; the likeliest of each half."""
    found = programs["two"]["collectives"]
    assert sum(kind == "all-reduce" for _, kind in found) == 5, found
    numbers = [
        math.prod(map(int, dims.split(","))) for shape, _ in found for dims in re.findall(r"\[([\d,]+)\]", shape)
    ]
    assert max(numbers) <= 2 * 4096, found


def test_on_two_gpus_the_sums_are_in_the_graph(programs):
    sums = [step["in_graph"] for step in programs["two"]["steps"] if step["kind"] in ("kAllReduce", "kAllGather")]
    assert len(sums) == 6 and all(sums), programs["two"]["steps"]
