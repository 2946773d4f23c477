"""The cases of `run.py`, one test each, and the sanitizers; `make test-gpu` runs them without pytest."""

import os

import pytest

if os.environ.get("QJAX_TEST_GPU") != "1":
    pytest.skip("needs a GPU: set QJAX_TEST_GPU=1", allow_module_level=True)

from decoder_layer import Layer
from gpu import attention_checks, layer_checks
from gpu.kernel_checks import Case, check, compile_case
from gpu.kernel_selection import selected, with_graph
from gpu.sanitizer import Sanitizer
from products import gpu_routes

SEED = int(os.environ.get("QJAX_TEST_SEED", "0"))  # the same in every process that collects
CASES = selected(gpu_routes(), SEED)
GRAPHS = with_graph(CASES)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_is_right(case: Case) -> None:
    wrong, _ = check(case, compile_case(case, case in GRAPHS))
    assert not wrong


@pytest.mark.parametrize("case", [case for case in attention_checks.CASES if attention_checks.claimed(case)], ids=str)
def test_attention_of_one_token_is_right(case: attention_checks.AttentionCase) -> None:
    assert not attention_checks.check_attention(case)


@pytest.mark.parametrize("layer", layer_checks.CASES if layer_checks.claimed() else (), ids=str)
def test_a_layers_products_are_right(layer: Layer) -> None:
    assert not layer_checks.check_layer(layer)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_sanitizer_finds_nothing(tool: str) -> None:
    wrong, skipped = Sanitizer(tool, SEED).outcome(600)
    if skipped is not None:
        pytest.skip(skipped)
    assert not wrong
