"""The whole benchmark on small products: its records are complete, right, and written as they come."""

import json
from pathlib import Path
from typing import Any

import pytest

from qjax import devices
from qjax.bench import gemm
from qjax.bench.cases import cases_of, parse_schemes
from qjax.bench.gemm import bench_gemm
from qjax.bench.operands import product_of
from qjax.bench.programs import Effort
from qjax.bench.records import Results, key_of
from qjax.dispatch import roofline
from qjax.dispatch.choose import choose

TINY = Effort(seconds=1e-4, most_calls=8, runs=3, weights=2)
MACHINE = {"device": "CPU", "jax": "?", "jaxlib": "?", "bandwidth": 1e10, "bf16_rate": 1e11}
CASES = cases_of(parse_schemes("w4a16,w8a8_int8"), ["auto", "xla", "triton"], [1, 3], [(64, 128)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("bench") / "gemm.json"
    told: list[dict[str, Any]] = []
    assert bench_gemm(CASES, Results(path, MACHINE, "abc"), effort=TINY, report=told.append)
    return path, told


def test_there_is_a_record_for_each_case_that_a_backend_can_do(measured) -> None:
    path, told = measured
    document = json.loads(path.read_text())
    able = [case.key for case in CASES if case.backend != "triton"]
    assert sorted(map(key_of, document["records"])) == sorted(able)
    assert sorted(map(key_of, told)) == sorted(able)
    refused = [one for one in document["failures"] if one["backend"] == "triton"]
    assert len(refused) == 4 and all("cannot run" in one["error"] for one in refused)


def test_a_record_has_times_errors_and_shares_that_agree(measured) -> None:
    for record in json.loads(measured[0].read_text())["records"]:
        assert 0 < record["us_min"] <= record["us"] <= record["us_max"]
        assert record["speedup"] == pytest.approx(record["bf16_us"] / record["us"], rel=1e-4)
        assert record["route"].partition(".")[0] in ("xla", "cpu")
        assert record["config"] == {} and record["kernel_us"] is None
        assert record["rel_err"] < 1e-6
        assert record["calls"] >= record["weights"] >= 2
        assert record["bf16_layout"] in ("nk", "kn") and record["bf16_drift"] > -1
        operations = 2 * record["m"] * record["n"] * record["k"] / (record["us"] * 1e-6)
        assert record["share_of_bf16_rate"] == pytest.approx(operations / 1e11, rel=1e-4)
        assert 0 < record["share_of_bandwidth"]


def test_a_kernel_that_two_names_come_to_is_measured_once(tmp_path: Path) -> None:
    results, told = Results(tmp_path / "r.json", MACHINE, "abc"), []
    (auto,) = cases_of(parse_schemes("w4a16"), ["auto"], [1], [(64, 128)])
    name = choose(product_of(auto.scheme, 1, 64, 128, "float32")).route.backend
    cases = cases_of(parse_schemes("w4a16"), ["auto", name], [1], [(64, 128)])
    assert bench_gemm(cases, results, effort=TINY, report=told.append)
    assert len(told) == 2 and {**told[0], "backend": ""} == {**told[1], "backend": ""}


def test_what_a_file_has_is_not_measured_again(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "build_all", lambda builders: pytest.fail("compiled again"))
    results = Results(measured[0], MACHINE, "abc")
    assert bench_gemm(CASES, results, effort=TINY)
    assert len(list(results)) == 8


def test_without_time_nothing_is_begun_and_that_is_said(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", MACHINE, "abc")
    assert not bench_gemm(CASES[:1], results, effort=TINY, budget=0.0)
    assert not list(results)


def test_a_product_that_fails_costs_its_own_record_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gemm.build_all

    def first_breaks(builders):
        found = whole(builders)
        return found if len(found) == 2 * 1 and "dense" in found[0].name else [RuntimeError("no room"), *found[1:]]

    monkeypatch.setattr(gemm, "build_all", first_breaks)
    results = Results(None, MACHINE, "abc")
    bench_gemm(cases_of(parse_schemes("w4a16,w8a16"), ["auto"], [1], [(64, 128)]), results, effort=TINY)
    assert [record["scheme"] for record in results] == ["w8a16"]
    assert [(one["scheme"], one["error"]) for one in results.failures] == [
        ("w4a16:group_size=128", "RuntimeError: no room")
    ]


def test_the_ceilings_of_bytes_are_those_of_a_fused_kernel() -> None:
    problem = gemm.product_of(CASES[0].scheme, 1, 4096, 4096, devices.compute_dtype(devices.find_device("H200")))
    least = roofline.estimate(problem, devices.find_device("H200"), roofline.PEAK)
    assert least.bytes == 4096 * 4096 // 2 + 4096 * 32 * 2 + 2 * 4096 * 2
