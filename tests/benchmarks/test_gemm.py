"""What is measured for the committed results, in which order, and that a file of them can be drawn anywhere."""

from pathlib import Path

import pytest

from benchmarks import gemm
from qjax.bench.cases import BACKENDS, parse_backends, parse_rows, parse_schemes, parse_shapes
from qjax.bench.plot import plot_speedups
from qjax.bench.records import KEYS, Results


def test_the_most_important_sizes_come_first_and_each_case_once() -> None:
    cases = gemm.stages()
    assert len(set(cases)) == len(cases)
    backends = len(parse_backends(BACKENDS))
    first = cases[: 3 * 9 * backends]
    assert {c.scheme for c in first} == set(parse_schemes("w4a16"))
    then = cases[: 3 * (9 + 3 * 4) * backends]  # int4 at all rows, the other main schemes at some
    assert {(c.n, c.k) for c in then} == set(parse_shapes(gemm.MAIN_SHAPES))
    assert {c.m for c in then if c not in first} == set(parse_rows(gemm.MAIN_ROWS))
    assert {c.scheme for c in then} == set(parse_schemes(gemm.MAIN_SCHEMES))
    everything = {(c.scheme, c.m, c.n, c.k) for c in cases}
    assert {(s, m, *nk) for s in parse_schemes(gemm.SCHEMES) for m in parse_rows(gemm.ROWS)
            for nk in parse_shapes(gemm.SHAPES)} <= everything  # fmt: skip


def test_a_file_is_drawn_without_its_gpu(tmp_path: Path) -> None:
    machine = {"device": "H200", "jax": "0.11.2", "jaxlib": "0.11.2"}
    cases = [case for case in gemm.stages()[:60] if case.backend == "auto"]
    Results(tmp_path / "gemm-h200.json", machine, "abc").add(
        {**dict(zip(KEYS["gemm"], case.key, strict=True)), "speedup": 1.5} for case in cases
    )
    out = gemm.draw(tmp_path / "gemm-h200.json")
    assert out == tmp_path / "gemm-h200.png" and out.read_bytes().startswith(b"\x89PNG")


def test_files_are_drawn_together_and_nothing_is_expected_of_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, paths = {"device": "H200", "jax": "0.11.2", "jaxlib": "0.11.2"}, [tmp_path / "a.json", tmp_path / "b.json"]
    keys = ["scheme", "backend", "m", "n", "k"]
    for path, scheme, speedup in ((paths[0], "nf4", 2.0), (paths[1], "nf4", 1.0), (paths[1], "w8a16", 3.0)):
        record = dict(zip(keys, (scheme, "auto", 1, 4096, 4096), strict=True))
        Results(path, machine, "abc").add([{"op": "gemm", **record, "speedup": speedup}])
    seen = []
    plot = plot_speedups
    monkeypatch.setattr("qjax.bench.plot.plot_speedups", lambda *args, **kw: seen.append(args) or plot(*args, **kw))
    assert gemm.draw(*paths) == tmp_path / "a.png"
    records, expected = seen[0]
    assert [(r["scheme"], r["speedup"]) for r in records] == [("nf4", 2.0), ("w8a16", 3.0)]
    assert {prediction.scheme for prediction in expected} == {"nf4", "w8a16"}


@pytest.mark.slow
def test_a_rehearsal_measures_on_any_machine_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gemm, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gemm.py", "--rehearse", "--commit", "abc"])
    gemm.main()
    said = capsys.readouterr().out
    assert "512x256 m=130" in said and "xla.reference" in said
    assert "8 of 20 records, 12 that a backend cannot make" in said
    assert not list(tmp_path.iterdir())
