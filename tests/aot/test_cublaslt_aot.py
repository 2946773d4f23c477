"""cuBLASLt's custom call compiles for GPUs that are not there: inside the CUDA graph, and no weight is copied."""

from typing import Any

import pytest
from aot.compiler import answer_of, missing

from xla_ffi.cublaslt import library
from xla_ffi.cublaslt.call import WORKSPACE

if reason := missing():
    pytest.skip(reason, allow_module_level=True)
if not library.LIBRARY.exists():
    pytest.skip("the handlers are not built: make setup", allow_module_level=True)

pytestmark = pytest.mark.slow

WEIGHT = 2048 * 2048  # bytes of one layer's weight


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return answer_of("cublaslt_programs.py")


def calls(program: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for step in program["steps"] if step["kind"] == "kCustomCall"]


@pytest.mark.parametrize("name", ["one scale, L4", "one scale, H200", "rows", "blocks", "mxfp8"])
def test_a_product_is_one_call_inside_the_graph(programs, name):
    program = programs[name]
    assert len(calls(program)) == 1
    assert all(step["in_graph"] for step in program["steps"]), program["steps"]
    assert program["hlo"].count(f'custom_call_target="{library.TARGET}"') == 1


def test_what_follows_a_product_with_a_bias_and_relu_is_nothing(programs):
    assert programs["rows"]["steps"][-1]["kind"] == "kCustomCall"


def test_a_stack_of_weights_is_one_call_that_reads_it_where_it_lies(programs):
    program = programs["stack"]
    assert len(calls(program)) == 1
    assert all(step["in_graph"] for step in program["steps"])
    assert program["scratch"] < WORKSPACE + WEIGHT


def test_layers_in_arrays_of_their_own_run_inside_the_graph_with_one_workspace(programs):
    program = programs["list"]
    assert len(calls(program)) == 6
    assert all(step["in_graph"] for step in program["steps"]), program["steps"]
    assert program["scratch"] < WORKSPACE + WEIGHT


def test_a_scan_over_layers_reads_each_weight_where_it_lies(programs):
    """XLA computes the slice's address on the host instead of copying it, and keeps such a step out of the graph."""
    program = programs["scan"]
    assert program["scratch"] < WORKSPACE + WEIGHT, "room for a copy of a layer's weight"
    kinds = [step["kind"] for step in program["steps"]]
    assert kinds.index("kDynamicSliceFusion") + 1 == kinds.index("kCustomCall"), kinds
    (call,) = calls(program)
    assert not call["in_graph"]
