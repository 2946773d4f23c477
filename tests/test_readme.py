"""What the README and the docs show is run: Python blocks, `qjax` commands, and every measured number in a table."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import qjax
from qjax.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the line it begins in."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, found.start(1)), found.group(1)


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `qjax` command in a page's shell blocks, continued lines joined."""
    for _, block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["qjax"]:
                yield words[1:]


def tables(page: Path) -> Iterator[dict[str, str]]:
    """Every row of every table: heading -> cell, both without markup."""
    heads: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`*") for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            heads = []
        elif not heads:
            heads = cells
        elif not set("".join(cells)) <= set("-: "):
            yield dict(zip(heads, cells, strict=True))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the examples where the pages expect them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_page
def test_every_python_block_runs_in_the_order_of_the_page(page: Path, workplace: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        # Lines of a traceback are then those of the page.
        exec(compile("\n" * line + source, str(page), "exec"), names)


@pytest.mark.slow
@each_page
def test_every_command_succeeds_in_the_order_of_the_page(page: Path, workplace: Path) -> None:
    for _, rules in blocks(page, "rules"):
        (workplace / "rules.txt").write_text(rules)
    for arguments in commands(page):
        assert main([*arguments, "--debug"]) == 0, shlex.join(["qjax", *arguments])


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_notebooks_are_committed_without_outputs() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, notebook.name


def measured() -> dict[tuple[str, str], dict[str, str]]:
    """Scheme and recipe (none is to nearest) -> what a table may say of it, by heading."""
    rounded, calibrated, searched = (
        json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))
        for name in ("accuracy", "calibration", "search")
    )
    base, dense = rounded["base_perplexity"], 2 * 3_145_728
    found = {("bf16", ""): {"bytes": f"{dense:,}", "ratio": "1.00x", "perplexity": f"{base:.3f}"}}
    for row in rounded["rows"] + calibrated["rows"] + searched["rows"]:
        scheme = row["scheme"] if "scheme" in row else f"{row['budget_bits']:g} bits"
        found[scheme, row.get("recipe") or ""] = {
            "bytes": f"{row['bytes']:,}",
            "ratio": f"{dense / row['bytes']:.2f}x",
            "bits/weight": f"{16 * row['bytes'] / dense:.3f}",
            "perplexity": f"{row['perplexity']:.3f}",
            "change": f"{100 * (row['perplexity'] / base - 1):+.2f} %",
            "KL": f"{row['kl']:.4f}",
            "top-1": f"{100 * row['top1']:.1f} %",
        }
    return found


@each_page
def test_tables_quote_what_was_measured(page: Path) -> None:
    known = measured()
    for row in tables(page):
        if "perplexity" in row:
            said = known[row["scheme"], row.get("recipe", "")]
            assert {head: row[head] for head in said if head in row} == {h: v for h, v in said.items() if h in row}


def test_the_table_of_schemes_has_them_all_and_their_weight() -> None:
    rows = {row["string"]: row for row in tables(ROOT / "docs" / "schemes.md") if "string" in row}
    assert rows.keys() == qjax.SCHEMES.keys()
    k = 1024
    for name, row in rows.items():
        assert row["constructor"] == qjax.SCHEMES[name].__name__
        first, _, per_row = row["bits/weight"].removesuffix("/K").partition(" + ")
        w = jax.eval_shape(lambda w, name=name: qjax.quantize_array(w, name), jax.ShapeDtypeStruct((k, k), "float32"))
        assert w.bits_per_weight == pytest.approx(float(first) + float(per_row or 0) / k, abs=1e-4), name
