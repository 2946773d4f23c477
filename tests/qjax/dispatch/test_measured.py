"""What was measured on an H200 decides there: results against what dispatch takes, as if cuBLASLt were here."""

import collections
from pathlib import Path

import numpy as np
import pytest

from qjax.bench.cases import parse_schemes
from qjax.bench.operands import product_of
from qjax.bench.records import read_gemm
from qjax.devices import find_device
from qjax.dispatch import tuning
from qjax.dispatch.choose import choose, refusal
from qjax.dispatch.routes import ROUTES
from xla_ffi.cublaslt import dense, library, matmul

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
H200 = find_device("H200")
BF16 = np.dtype("bfloat16")
# Without Blackwell's, so that nothing that `choose` keeps under other circumstances answers here, nor the reverse.
OF_H200 = tuple(route for route in ROUTES if route.cc_min <= H200.cc)
NOISE = 1.05  # between two runs of one kernel


@pytest.fixture(autouse=True)
def as_on_the_gpu(monkeypatch, tmp_path):
    """Shipped tables alone, and the library as that machine had it."""
    monkeypatch.setenv("QJAX_TUNING_DIR", str(tmp_path))
    for module in (library, matmul, dense):
        monkeypatch.setattr(module, "missing", lambda: None)
    monkeypatch.setattr(library, "version", lambda: 130100)


def measured():
    """(scheme, n, k, m) -> microseconds by route, and of the dense product, each of its newest run."""
    times, of_bf16 = collections.defaultdict(dict), {}
    documents = [d for d in read_gemm(RESULTS) if d["machine"]["device"] == "H200"]
    for document in sorted(documents, key=lambda d: d["date"]):
        for record in document["records"]:
            if record["backend"] != "gemlite":
                product = (record["scheme"], record["n"], record["k"], record["m"])
                times[product][record["route"]] = record["us"]
                of_bf16[product] = record["bf16_us"]
    return times, of_bf16


def taken(scheme, n, k, m):
    return choose(product_of(parse_schemes(scheme)[0], m, n, k, BF16), H200, routes=OF_H200).route.name


def test_no_kernel_is_taken_that_measured_slower_than_another():
    times, _ = measured()
    assert len(times) > 150
    worse = {
        product: (route, us[route], min(us, key=us.get), min(us.values()))
        for product, us in times.items()
        if (route := taken(*product)) in us and us[route] > NOISE * min(us.values())
    }
    assert not worse


def test_no_kernel_is_taken_that_measured_slower_than_bf16_where_another_was_faster():
    times, of_bf16 = measured()
    worse = [
        product
        for product, us in times.items()
        if us.get(taken(*product), 0) > of_bf16[product] > NOISE * min(us.values())
    ]
    assert not worse


def test_an_entry_of_the_shipped_table_is_a_product_that_the_kernel_can_run():
    routes = {route.name: route for route in ROUTES}
    for entry in tuning.read("H200"):
        problem = product_of(parse_schemes(entry.scheme)[0], entry.m, entry.n, entry.k, BF16)
        assert refusal(routes[entry.kernel], problem, H200) is None, entry
