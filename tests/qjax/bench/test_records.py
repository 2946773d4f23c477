"""Files of measurements: written whole, read again, and never mixed."""

import json
from pathlib import Path

import pytest

from qjax.bench.records import Results, key_of, read, read_gemm
from qjax.errors import QJaxError

MACHINE = {"gpu": "NVIDIA H200", "device": "H200", "jax": "0.11.2", "jaxlib": "0.11.2", "bandwidth": 4.3e12}


def record(m: int = 1, **fields) -> dict:
    return {"op": "gemm", "scheme": "w4a16", "backend": "auto", "m": m, "n": 64, "k": 128, "us": 1.0, **fields}


def test_a_run_goes_on_where_its_file_stopped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    first = Results(path, MACHINE, "abc")
    first.fail(key_of(record(16)), "no time")
    first.add([record(1, us=1.23456789, extra="a peer's")])
    second = Results(path, {**MACHINE, "bandwidth": 1.0}, "abc")
    assert key_of(record(1)) in second and key_of(record(16)) not in second
    assert second.machine["bandwidth"] == 4.3e12  # what the first records were divided by
    second.add([record(16)])
    document = read(path)
    assert [r["m"] for r in document["records"]] == [1, 16]
    assert document["records"][0]["us"] == 1.23457 and document["records"][0]["extra"] == "a peer's"
    assert document["failures"] == []
    assert document["commit"] == "abc" and document["machine"]["gpu"] == "NVIDIA H200"
    assert path.read_text().count('\n  {"op"') == 2  # a line each
    assert list(path.parent.iterdir()) == [path]


def test_a_record_of_the_same_key_is_replaced(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", MACHINE, None)
    results.add([record(us=1.0)])
    results.add([record(us=2.0)])
    assert [r["us"] for r in results] == [2.0]


@pytest.mark.parametrize(("name", "value"), [("device", "L4"), ("jax", "0.12.0"), ("commit", "def")])
def test_other_machines_versions_and_revisions_need_another_file(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "r.json"
    Results(path, MACHINE, "abc").add([record()])
    machine, commit = (MACHINE, value) if name == "commit" else ({**MACHINE, name: value}, "abc")
    with pytest.raises(QJaxError, match=f"r.json: was measured with {name} .*, this is {value}: give another file"):
        Results(path, machine, commit)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"records": []}', '{"machine": {}, "commit": 1, "date": 1, "records": [{}]}']
)
def test_a_file_that_is_none_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(QJaxError, match="r.json"):
        Results(path, MACHINE, "abc")
    assert path.read_text() == text


def test_a_folder_of_results_yields_those_of_gemm(tmp_path: Path) -> None:
    Results(tmp_path / "b.json", MACHINE, "abc").add([record()])
    (tmp_path / "a.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "c.json").write_text(json.dumps({"records": [{"op": "decode"}]}))
    assert [d["records"][0]["m"] for d in read_gemm(tmp_path)] == [1]
    assert read_gemm(tmp_path / "none") == []
