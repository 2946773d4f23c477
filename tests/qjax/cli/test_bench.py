"""`qjax bench`, `qjax tune` and `qjax roofline`: what they print, what they leave behind, and their errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from qjax.bench import machine
from qjax.cli import bench_gemm
from qjax.cli.main import main


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings from small arrays."""
    whole_bandwidth, whole_rate = machine.copy_bandwidth, machine.bf16_rate
    monkeypatch.setattr(machine, "copy_bandwidth", lambda size: whole_bandwidth(2**16))
    monkeypatch.setattr(machine, "bf16_rate", lambda side: whole_rate(32))
    monkeypatch.setattr(bench_gemm, "QUICK", bench_gemm.QUICK._replace(seconds=1e-4, weights=2))


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert main([str(arg) for arg in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_bench_prints_a_table_and_leaves_records_and_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ("--shapes", "64x128", "--schemes", "w4a16,nf4:block_size=32", "--backends", "xla,triton")
    files = ("--json", tmp_path / "r.json", "--plot", tmp_path / "out" / "p.png", "--commit", "abc")
    out = run(capsys, "bench", "gemm", "--quick", "--m", "1", *sizes, *files)
    assert "64 x 128  1  w4a16:group_size=128" in out and "xla.reference" in out
    assert "not measured: nf4:block_size=32 on triton: backend 'triton' cannot run" in out
    assert (tmp_path / "out" / "p.png").stat().st_size > 1000
    document = json.loads((tmp_path / "r.json").read_text())
    assert [(r["op"], r["scheme"]) for r in document["records"]] == [
        ("gemm", "w4a16:group_size=128"),
        ("gemm", "nf4:block_size=32"),
    ]
    assert document["commit"] == "abc" and document["machine"]["bandwidth"] > 0
    run(capsys, "bench", "gemm", "--quick", "--m", "1,2", *sizes, *files)  # goes on
    assert len(json.loads((tmp_path / "r.json").read_text())["records"]) == 4


def test_a_record_of_another_revision_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["bench", "gemm", "--quick", "--m", "1", "--shapes", "64x128", "--schemes", "w8a16", "--backends", "xla"]
    argv += ["--json", str(tmp_path / "r.json"), "--commit"]
    assert main([*argv, "abc"]) == 0
    assert main([*argv, "def"]) == 1
    assert "was measured with commit abc, this is def" in capsys.readouterr().err


def test_tune_prints_what_it_wrote(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ("tune", "--shapes", "64x128", "--m", "1", "--schemes", "w8a16", "--output", tmp_path)
    out = run(capsys, *argv, "--routes", "xla.reference")
    assert "its own choice" in out and f"written to {tmp_path / 'cpu.json'}" in out
    assert json.loads((tmp_path / "cpu.json").read_text())["entries"][0]["kernel"] == "xla.reference"
    assert "nothing new" in run(capsys, *argv, "--routes", "xla.reference")
    assert "1 of 1 are left" in run(capsys, *argv, "--routes", "xla.reference", "--again", "--limit", "0")


def test_roofline_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "roofline", "--device", "H200", "--m", "1,2048", "--schemes", "w4a16,w8a8_fp8")
    assert out.startswith("on H200") and "3.67x" in out and "compute" in out
    rows = json.loads(run(capsys, "roofline", "--device", "h200", "--m", "1", "--schemes", "w4a16", "--json"))
    assert rows[0]["bytes"] == 46_550_016 and rows[0]["bound"] == "memory" and rows[0]["n"] == 22016


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "softmax"], "invalid choice: 'softmax'"),
        (["bench", "gemm", "--shapes", "big"], "shape 'big' is not NxK"),
        (["bench", "gemm", "--backends", "quick"], "unknown backend 'quick'"),
        (["bench", "gemm", "--quick", "--shapes", "64x100"], "64x100: group_size=128 does not divide K=100"),
        (["tune", "--routes", "magic"], "unknown route 'magic'"),
        (["roofline", "--device", "H300"], "unknown device 'H300'"),
        (["roofline", "--m", "none"], "number of rows 'none'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_error_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status not in (0, None)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
