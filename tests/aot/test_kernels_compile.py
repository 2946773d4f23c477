"""Kernels compile for GPUs that are not there: no spills, within shared memory, every step in a CUDA graph.

A part by default; all of it with QJAX_AOT=all (`make test-aot`).
"""

import os
from collections.abc import Iterator

import pytest
from aot.compiler import Compiler, missing
from aot.kernel_cases import Case, every, one_step, subset, tuned

from qjax.devices import find_device

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow

WHOLE = os.environ.get("QJAX_AOT") == "all"


def _part(cases: list[Case]) -> list[Case]:
    return cases if WHOLE else subset(cases)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    one = Compiler()
    yield one
    one.close()


def _check(case: Case, compiler: Compiler) -> None:
    report = compiler(case.device, case.product, case.route, dict(case.config))
    assert not report.error, report.error
    assert report.steps, "no steps: nothing was compiled"
    local = [f"{k.name}: {k.spills} bytes spilled, {k.stack} of stack" for k in report.kernels if k.spills or k.stack]
    assert not local, local
    serialized = [k.name for k in report.kernels if k.serialized]
    assert not serialized, f"{serialized}: tensor core instructions wait for one another"
    limit = find_device(case.device).shared.smem_block
    static = {k.name: k.shared for k in report.kernels}
    over = [f"{s.name}: {s.shared}" for s in report.steps if s.shared + static.get(s.name, 0) > limit]
    assert not over, f"{over} bytes of shared memory, {case.device} has {limit}"
    outside = [f"{s.kind} {s.name}" for s in report.steps if not s.in_graph]
    assert not outside, f"{outside} cannot enter a CUDA graph"


@pytest.mark.parametrize("case", _part(every()), ids=str)
def test_a_kernel_compiles_with_the_config_it_picks(case: Case, compiler: Compiler) -> None:
    _check(case, compiler)


@pytest.mark.parametrize("case", _part(tuned()), ids=str)
def test_a_kernel_compiles_with_a_tuned_config(case: Case, compiler: Compiler) -> None:
    _check(case, compiler)


@pytest.mark.parametrize("case", _part(one_step()), ids=str)
def test_decoding_and_reducing_are_one_kernel(case: Case, compiler: Compiler) -> None:
    report = compiler(case.device, case.product, case.route, dict(case.config))
    assert not report.error, report.error
    assert [s.kind for s in report.steps] == ["kCustomKernel"], [s.name for s in report.steps]
    assert report.scratch == 0
