"""Pages quote what was measured: their tables are those that `benchmarks/quote.py` makes of the committed results."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import qjax
from benchmarks import quote
from benchmarks.kernel_table import WEIGHTS

RECORDS = [  # scheme, backend, m, us, speedup
    ("w4a16:group_size=128", "auto", 1, 20.04, 2.3),
    ("nf4", "triton", 64, 41.0, 1.2),
]
DOCUMENT = {
    "machine": {"device": "H200", "jax": "0.11.2", "jaxlib": "0.11.2"},
    "commit": "abc123",
    "date": "2026-01-01",
    "records": [
        {
            "op": "gemm",
            "scheme": scheme,
            "backend": backend,
            "m": m,
            "n": 22016,
            "k": 4096,
            "us": us,
            "speedup": speedup,
        }
        for scheme, backend, m, us, speedup in RECORDS
    ],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "gemm-h200.json").write_text(json.dumps(DOCUMENT))
    return tmp_path


def block(name: str) -> str:
    return f"before\n<!-- quote {name} gemm-h200.json -->\nold\n<!-- end of quote -->\nafter\n"


def test_a_block_gets_the_times_and_speedups_of_its_records(results: Path) -> None:
    text = quote.quoted(block("by-shape"), results.parent, results)
    assert "| 1 | 20.0 us, 2.30x | - | - |\n" in text and "| 16 | - | - | - |\n" in text
    assert text.startswith(
        "before\n<!-- quote by-shape gemm-h200.json -->\n| M | 22016x4096 | 8192x8192 | 4096x4096 |\n"
    )
    link = f"[gemm-h200.json]({results.name}/gemm-h200.json)"
    assert text.endswith(f"NVIDIA H200, jax 0.11.2, revision abc123: {link}.\n<!-- end of quote -->\nafter\n")
    assert quote.quoted(text, results.parent, results) == text


def test_the_plot_is_shown_where_there_is_one(results: Path) -> None:
    (results / "gemm-h200.png").touch()
    assert "](gemm-h200.png)\n<!-- end" in quote.quoted(block("by-shape"), results, results)
    assert ".png" not in quote.quoted(block("triton"), results, results)


def test_a_table_of_one_backend_has_no_other_records(results: Path) -> None:
    lines = {line.split(" |")[0]: line for line in quote.quoted(block("triton"), results, results).splitlines()}
    assert "41.0 us, 1.20x" in lines["| `nf4`"]
    assert " us" not in lines["| `w4a16:group_size=128`"]


def test_tokens_a_second_stand_beside_the_dense_models(tmp_path: Path) -> None:
    size = {"op": "decode", "model": "llama-2-7b", "backend": "auto", "prompt": 512, "gpus": 1}
    records = [
        {**size, "scheme": "dense", "cache": "dense", "batch": 1, "tok_s": 250.4, "speedup": None},
        {**size, "scheme": "nf4", "cache": "dense", "batch": 16, "tok_s": 4000.0, "speedup": 1.4},
        {**size, "scheme": "nf4", "cache": "int8", "batch": 1, "gpus": 2, "tok_s": 700.0, "speedup": 2.8},
    ]
    (tmp_path / "gemm-h200.json").write_text(json.dumps({**DOCUMENT, "records": records}))
    text = quote.quoted(block("decode"), tmp_path, tmp_path)
    assert "| model | scheme | batch 1 | batch 16 |\n" in text
    assert "| llama-2-7b, 512 tokens read | `dense` | 250 tok/s | - |\n" in text
    assert "| llama-2-7b, 512 tokens read | `nf4` | - | 4000 tok/s, 1.40x |\n" in text
    assert "| llama-2-7b, 512 tokens read, 2 GPUs | `nf4`, int8 cache | 700 tok/s, 2.80x | - |\n" in text


def test_a_block_without_results_stays_as_it_is(tmp_path: Path) -> None:
    assert quote.quoted(block("by-scheme"), tmp_path, tmp_path) == block("by-scheme")


def test_the_table_of_kernels_is_what_dispatch_chooses() -> None:
    text = quote.quoted("<!-- quote kernels dispatch -->\nold\n<!-- end of quote -->", Path(), Path())
    lines = text.splitlines()
    assert lines[1].startswith("| format | bits | scheme | A100 |") and "old" not in lines
    assert [line.split(" | ")[1] for line in lines[3:-1]] == [bits for _, bits, _ in WEIGHTS]
    w = qjax.quantize_array(jnp.ones((4096, 4096)), "nf4")
    (row,) = qjax.explain(w, m=1, device="H100", x_dtype="bfloat16").rows
    (line,) = (line for line in lines if "| `nf4` |" in line)
    assert f"`{row.kernel}`" in line


@pytest.mark.parametrize("page", quote.pages(), ids=lambda page: page.stem)
def test_pages_say_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert quote.quoted(text, page.parent) == text, "run python -m benchmarks.quote"
    assert text.count("<!-- quote ") == text.count("<!-- end of quote -->") == len(quote.BLOCK.findall(text))


def test_products_of_a_cpu_are_quoted_by_size_and_threads_the_last_run_of_each(tmp_path: Path) -> None:
    def run(threads: int, us: float) -> dict:
        record = {"name": "w4a16", "m": 1, "n": 4096, "k": 4096, "us": us, "speedup": 4.5}
        return {"threads": threads, "instructions": "avx2", "jax": "0.11.2", "revision": "abc", "note": "quiet",
                "records": [record]}  # fmt: skip

    document = {"processor": "some", "runs": [run(1, 999.0), run(2, 300.0), run(1, 500.0)]}
    (tmp_path / "gemm-h200.json").write_text(json.dumps(document))
    text = quote.quoted(block("cpu"), tmp_path, tmp_path)
    assert "|  | 4096x4096, M = 1, 1 thread | 4096x4096, M = 1, 2 threads |\n" in text
    assert "| `w4a16` | 0.50 ms, 4.50x | 0.30 ms, 4.50x |\n" in text
    assert "avx2, jax 0.11.2, revision abc; quiet.\n<!-- end" in text
