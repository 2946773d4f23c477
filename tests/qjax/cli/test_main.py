"""The command: what it prints, what it leaves behind, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PYLM, fail, run

import qjax
from qjax import devices
from qjax.checkpoints.load import load
from qjax.cli import tables
from qjax.cli.main import COMMANDS, main
from qjax.dispatch.backends import BACKENDS
from qjax.errors import QJaxError
from qjax.explain import layers
from qjax.models import load_tokenizer
from qjax.models.perplexity import perplexity
from qjax.qtensor import is_qtensor

INT4_BYTES = 1_622_016  # 3,145,728 codes of half a byte, 24,576 float16 scales


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert set(COMMANDS) == {
        "quantize",
        "search",
        "convert",
        "generate",
        "perplexity",
        "compare",
        "explain",
        "devices",
        "roofline",
        "bench",
        "tune",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--debug" in capsys.readouterr().out


ERRORS: list[tuple[list[str], str]] = [
    ([], "arguments are required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["quantize", "{pylm}"], "arguments are required: OUT"),
    (["generate", "{pylm}", "--prompt", "x", "--top-k", "many"], "invalid int value: 'many'"),
    (["devices", "--colour"], "unrecognized arguments: --colour"),
    (["explain", "{tmp}/nothing"], "nothing: does not exist; expected a local checkpoint folder"),
    (["explain", "{pylm}", "--device", "H300"], "unknown device 'H300'"),
    (["explain", "{pylm}", "--backend", "quick"], "unknown backend 'quick'"),
    (["explain", "{pylm}", "--scheme", "w9a16"], "unknown scheme 'w9a16'; known: w8a16"),
    (["quantize", "{pylm}", "{tmp}/out"], "give --scheme S, --rules FILE or both"),
    (["quantize", "{pylm}", "{tmp}/out", "--scheme", "w4a16:size=3"], "w4a16: unknown option 'size'"),
    (["quantize", "{pylm}", "{tmp}/out", "--scheme", "w4a16:group_size=96"], "group_size=96 does not divide K=256"),
    (["quantize", "{pylm}", "{pylm}", "--scheme", "w4a16"], "pylm-4m: would replace {pylm}, which is read for it"),
    (["quantize", "{pylm}", "{pylm}", "--scheme", "w4a16", "--overwrite"], "would replace {pylm}, which is read"),
    (["quantize", "{pylm}", "{tmp}/out", "--rules", "{tmp}/none"], "No such file"),
    (["quantize", "{pylm}", "{tmp}/out", "--scheme", "w4a16", "--recipe", "gptq"], "give --calibrate FILE"),
    (["quantize", "{pylm}", "{tmp}/out", "--scheme", "w4a16", "--recipe", "best"], "unknown recipe 'best'"),
    (["quantize", "{pylm}", "{tmp}/out", "--scheme", "w4a16", "--calibrate", "{pylm}/calib.txt"], "give --recipe R"),
    (
        [*"quantize {pylm} {tmp}/out --scheme w4a16 --recipe gptq --calibrate {pylm}/generation_config.json".split()],
        "generation_config.json: the text has ",
    ),
    ([*"quantize {pylm} {tmp}/out --scheme w8a8_int8:mode=static".split()], "give --calibrate FILE"),
    (
        [*"quantize {pylm} {tmp}/out --scheme w4a16 --resume {tmp}/state".split()],
        "rounding to nearest has nothing to resume",
    ),
    (
        [*"quantize {pylm} {tmp}/out --scheme w4a16 --act-scale most".split()],
        "--act-scale most: neither max, mse nor a percentile",
    ),
    (
        [*"quantize {pylm} {tmp}/out --scheme w4a16 --act-scale mse".split()],
        "--act-scale mse: no scheme here has static scales of x",
    ),
    (["search", "{pylm}", "--calibrate", "{pylm}/calib.txt"], "one of the arguments --budget-bits --budget-bytes"),
    (["search", "{pylm}", "--calibrate", "{tmp}/none", "--budget-bits", "4"], "No such file"),
    (
        [*"search {pylm} --calibrate {pylm}/calib.txt --budget-bits 4 --candidates w9a16".split()],
        "unknown scheme 'w9a16'",
    ),
    (
        ["perplexity", "{pylm}", "--text", "{tmp}/none"],
        "none: No such file or directory; expected a file of UTF-8 text",
    ),
    (["perplexity", "{pylm}", "--text", "{pylm}/config.json", "--tokenizer", "{tmp}"], "tokenizer.json: no such file"),
    (["generate", "{pylm}", "--prompt", "x", "--tokenizer", "{tmp}/none"], "none: does not exist; expected a folder"),
    (["generate", "{pylm}/config.json", "--prompt", "x"], "config.json: is a file; expected a local checkpoint folder"),
    (["perplexity", "{tmp}", "--text", "{pylm}/eval.txt"], "the folder is empty; expected config.json"),
    (["compare", "{tmp}/none", "{pylm}", "--text", "{pylm}/eval.txt"], "none: does not exist; expected a local"),
    (
        ["search", "{tmp}/none", "--calibrate", "{pylm}/calib.txt", "--budget-bits", "4"],
        "none: does not exist; expected",
    ),
    (
        ["perplexity", "{pylm}", "--text", "{pylm}/generation_config.json"],
        "tokens; expected at least one window of 512",
    ),
    (["perplexity", "{pylm}", "--text", "/dev/null"], "/dev/null: the text has 0 tokens; expected"),
    (["perplexity", "{pylm}", "--text", "{pylm}/reference_logits.npz"], "not UTF-8 text at byte"),
    (
        ["perplexity", "{pylm}", "--text", "{pylm}/eval.txt", "--windows", "0"],
        "--windows: '0'; expected an integer, at least 1",
    ),
    (["explain", "{pylm}", "--rows", "-1"], "--rows: '-1'; expected an integer, at least 1"),
    (["compare", "{pylm}", "{pylm}"], "arguments are required: --text"),
    (
        ["compare", "{pylm}", "{pylm}", "--text", "{pylm}/eval.txt", "--json", "{tmp}"],
        "is a folder; expected the name of",
    ),
    (["bench", "decode", "--models", "nothing"], "'nothing' is neither a folder nor one of llama-3.2-1b"),
    (["compare", "{pylm}", "{pylm}", "--text", "{tmp}/none"], "none: No such file or directory; expected a file"),
    (["compare", "{pylm}", "{tmp}", "--text", "{pylm}/eval.txt", "--windows", "1"], "config.json"),
    (["compare", "{pylm}", "{pylm}", "--text", "/dev/null"], "/dev/null: the text has 0 tokens; expected"),
    (["compare", "{pylm}", "{pylm}", "--text", "{pylm}/generation_config.json"], "expected at least one window"),
    (["generate", "{pylm}", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
    (["generate", "{pylm}", "--prompt", "x", "--max-new-tokens", "4096"], "exceed the model's 2048 positions"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_an_error_is_one_line_and_a_status(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message.format(pylm=PYLM) in fail(capsys, *(arg.format(pylm=PYLM, tmp=tmp_path) for arg in argv))
    assert not (tmp_path / "out").exists()


def test_static_scales_of_activations_come_from_a_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme, folder = "w8a8_int8:mode=static", tmp_path / "model"
    run(capsys, "quantize", PYLM, folder, "--scheme", scheme, "--calibrate", text, "--act-scale", "99.9")
    kernels = [layer.kernel for layer in layers(load(folder)) if is_qtensor(layer.kernel)]
    assert len(kernels) == 28 and all(float(w.act_scale) > 0 for w in kernels)
    assert "perplexity_activations" in run(capsys, "perplexity", folder, "--text", text, "--windows", "1")


def test_search_writes_rules_that_quantize_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules, found, plot, folder = (tmp_path / name for name in ("rules.txt", "found.json", "front.png", "model"))
    options = "--windows 1 --candidates w3a16 w8a16 --layers .*/3/.* --together [qkv]_proj --budget-bits 5".split()
    files = ["--rules", rules, "--json", found, "--plot", plot]
    out = run(capsys, "search", PYLM, "--calibrate", PYLM / "calib.txt", *options, *files)
    known = json.loads(found.read_text())
    assert known["found"]["bits"] <= 5 and f"{known['found']['nbytes']:,}" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    run(capsys, "quantize", PYLM, folder, "--rules", rules)
    kernels = {layer.path.replace(".", "/"): layer.kernel for layer in layers(load(folder))}
    schemes = {path: str(w.scheme) for path, w in kernels.items() if is_qtensor(w)}
    assert schemes == {layer["path"]: layer["scheme"] for layer in known["layers"]} and len(schemes) == 7
    assert len({schemes[f"layers/3/self_attn/{name}_proj"] for name in "qkv"}) == 1
    assert sum(kernels[path].nbytes for path in schemes) == known["found"]["nbytes"]


def test_compare_prints_layers_and_writes_json_and_a_page(
    int4: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "deep" / name for name in ("found.json", "found.html")]
    out = run(capsys, "compare", PYLM, int4, "--text", text, "--json", files[0], "--html", files[1])
    found = json.loads(files[0].read_text())
    assert len(found["layers"]) == 28 and f"{found['perplexity']:.5f}" in out
    assert found["model"] == {"folder": str(int4), "scheme": "w4a16:group_size=128", "bytes": INT4_BYTES}
    assert found["base"]["scheme"] is None and found["windows"] == 2
    ids = load_tokenizer(PYLM).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    known = perplexity(load(int4), ids, base=load(PYLM))
    assert [found[name] for name in ("perplexity", "kl", "top1")] == pytest.approx(
        [known.perplexity, known.kl, known.top1], rel=1e-5
    )
    assert "layers/3/mlp/down_proj" in files[1].read_text(encoding="utf-8")


def test_a_bug_is_one_line_too_with_its_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(_: Any) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(COMMANDS["devices"], "run", breaks)
    assert "KeyError: " in fail(capsys, "devices")


@pytest.mark.parametrize(
    "argv",
    [
        ["--debug", "explain", "nowhere"],
        ["explain", "nowhere", "--debug"],
        ["bench", "gemm", "--schemes", "nowhere", "--shapes", "64x128", "--debug"],
    ],
    ids=" ".join,
)
def test_debug_shows_the_traceback(argv: list[str]) -> None:
    with pytest.raises(QJaxError, match="nowhere"):
        main(argv)


def test_quantize_writes_a_folder_that_load_reads(int4: Path) -> None:
    found = list(layers(load(int4)))
    assert {str(layer.kernel.scheme) for layer in found} == {"w4a16:group_size=128"}
    assert sum(layer.kernel.nbytes for layer in found) == INT4_BYTES


def test_quantize_by_a_recipe_looks_at_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = ["--recipe", "gptq", "--calibrate", PYLM / "calib.txt", "--windows", "1"]
    (tmp_path / "rules").write_text("layers/0/self_attn/[qk]_proj w4a16")
    out = run(capsys, "quantize", PYLM, tmp_path / "out", "--rules", tmp_path / "rules", *calibration)
    assert "2 of 28" in out
    run(capsys, "convert", tmp_path / "out", tmp_path / "gptq", "--to", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] and config["sym"] and config["bits"] == 4
    ours, theirs = (load(tmp_path / name).layers[0].self_attn.k_proj.kernel.get_value() for name in ("out", "gptq"))
    assert np.array_equal(ours.dequantize(np.float32), theirs.dequantize(np.float32))


def test_quantize_says_what_became_of_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "quantize", PYLM, tmp_path / "out", "--scheme", "nvfp4").splitlines()
    assert out[0].split() == ["scheme", "layers", "bytes", "before", "bytes", "after", "ratio", "time"]
    assert out[1].startswith("nvfp4   28 of 28     6,291,456    1,769,584  3.56x")


def test_rules_come_first_and_the_scheme_is_for_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rules").write_text("# MLPs\nlayers/./mlp/.* nf4\n.*o_proj none\n", encoding="utf-8")
    run(capsys, "quantize", PYLM, tmp_path / "out", "--rules", tmp_path / "rules", "--scheme", "w8a16")
    schemes = {layer.path: str(getattr(layer.kernel, "scheme", None)) for layer in layers(load(tmp_path / "out"))}
    assert schemes["layers.1.mlp.up_proj"] == "nf4"
    assert schemes["layers.1.self_attn.o_proj"] == "None"
    assert schemes["layers.1.self_attn.q_proj"] == "w8a16"


def test_a_rule_that_matches_nothing_is_an_error_with_its_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules").write_text("layers/9/.* nf4\n", encoding="utf-8")
    assert "'layers/9/.*'" in fail(capsys, "quantize", PYLM, tmp_path / "out", "--rules", tmp_path / "rules")
    (tmp_path / "rules").write_text("one two three\n", encoding="utf-8")
    assert "rules, line 1" in fail(capsys, "quantize", PYLM, tmp_path / "out", "--rules", tmp_path / "rules")


def test_overwrite_replaces_a_checkpoint_but_no_other_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(capsys, "quantize", PYLM, out, "--scheme", "w4a16")  # an empty one is as good as none
    assert "exists" in fail(capsys, "quantize", PYLM, out, "--scheme", "w8a16")
    run(capsys, "quantize", PYLM, out, "--scheme", "w8a16", "--overwrite")
    assert {str(layer.kernel.scheme) for layer in layers(load(out))} == {"w8a16"}
    (out / "config.json").unlink()
    assert "not a checkpoint" in fail(capsys, "quantize", PYLM, out, "--scheme", "w8a16", "--overwrite")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("notes", ["--overwrite"], "notes: not overwritten: it has no config.json, so it is not a checkpoint"),
        ("notes", [], "notes: exists; choose another folder or allow to overwrite it (--overwrite)"),
        ("file", ["--overwrite"], "file: exists and is not a folder"),
        ("file/out", [], "file is no folder that can be written to"),
    ],
)
def test_the_place_for_the_result_is_looked_at_before_the_work(
    out: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qjax.cli.quantize.load", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("Dear diary")
    (tmp_path / "file").write_text("")
    assert message in fail(capsys, "quantize", PYLM, tmp_path / out, "--scheme", "w4a16", *options)


def test_perplexity_as_json_of_a_dense_model(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "perplexity", PYLM, "--text", text, "--json"))
    ids = load_tokenizer(PYLM).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    expected = perplexity(load(PYLM), ids)
    assert found == {
        "perplexity": expected.perplexity,
        "windows": 2,
        "tokens": 2 * 511,
        "bytes": 6_291_456,
        "scheme": None,
    }


def test_perplexity_on_the_fly_is_that_of_the_folder_and_its_base_is_the_folder_itself(
    text: Path, int4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--text", text, "--windows", 1, "--json")
    on_the_fly = json.loads(run(capsys, "perplexity", PYLM, "--scheme", "w4a16", *options))
    stored = json.loads(run(capsys, "perplexity", int4, "--base", PYLM, "--tokenizer", PYLM, *options))
    assert list(on_the_fly) == ["perplexity", "windows", "tokens", "bytes", "scheme", "kl", "top1"]
    assert (on_the_fly["bytes"], on_the_fly["scheme"]) == (INT4_BYTES, "w4a16:group_size=128")
    assert on_the_fly == stored
    # The whole text's KL is 0.069 and its agreement 0.87; one window may differ by a factor of two.
    assert 0.03 < on_the_fly["kl"] < 0.14 and 0.74 < on_the_fly["top1"] < 0.94


def test_perplexity_prints_a_table_without_json(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "perplexity", PYLM, "--text", text, "--windows", 1, "--scheme", "w8a16").splitlines()
    assert lines[0].split() == ["perplexity", "windows", "tokens", "bytes", "scheme", "kl", "top1"]
    assert lines[1].split()[1:5] == ["1", "511", "3,186,688", "w8a16"]


def test_explain_merges_alike_layers_and_is_for_the_device_that_was_named(
    int4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, "explain", int4, "--device", "h200", "--rows", 16).splitlines()
    assert lines[0].startswith("on H200")
    (down,) = (line for line in lines if "down_proj" in line)
    assert down.startswith("layers.*.mlp.down_proj") and "16 x 768 x 256" in down and down.endswith(" 4")
    assert sum("_proj" in line for line in lines) == 7


def test_explain_a_dense_folder_as_if_it_were_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not quantized" in run(capsys, "explain", PYLM)
    out = run(capsys, "explain", PYLM, "--scheme", "mxfp4", "--backend", "torch")
    assert "not quantized" not in out and "asked for" in out and "'torch' means" in out


def test_devices_lists_every_row_marks_ours_and_says_why_not_of_backends(capsys: pytest.CaptureFixture[str]) -> None:
    table, backends = run(capsys, "devices").split("\n\n")
    rows = table.splitlines()[2:]
    for row in devices.TABLE:
        assert sum(f" {row.name}  " in line for line in rows) == 1
    (ours,) = (line for line in rows[:-1] if line.startswith(">"))
    assert ours.split()[1] == "CPU"
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in backends.splitlines()[2:]}
    assert lines.keys() == set(BACKENDS)
    assert lines["xla"].startswith("yes") and lines["mosaic"].startswith("no: ")


def test_devices_gives_the_source_of_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "devices", "--sources")
    assert all(f"{row.name}: {row.source}" in out for row in devices.TABLE)


def test_a_table_is_drawn_on_a_terminal_and_plain_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = dict(title="[bold]", right=["n"], notes=["a note"])
    tables.show(("name", "n"), [("[red]", 1), ("b", None)], **given)
    assert capsys.readouterr().out == "[bold]\nname   n\n[red]  1\nb\na note\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    tables.show(("name", "n"), [("[red]", 1), ("b", None)], **given)
    drawn = capsys.readouterr().out
    assert "─" in drawn and "[red]" in drawn and "[bold]" in drawn and "a note" in drawn


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "qjax", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"qjax {qjax.__version__}\n"
