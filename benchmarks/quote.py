"""What do the pages say that was measured? Writes tables of `results/*.json` into the pages that quote them.

    python -m benchmarks.quote            rewrites every block of README.md and docs/ that has results
    python -m benchmarks.quote --check    changes nothing; exits with 1 where a page says something else

A block is what lies between `<!-- quote NAME FILE -->` and `<!-- end of quote -->`, NAME being a key of `TABLES`. Where
FILE is not there yet the block stays as it is. `<!-- quote kernels dispatch -->` is no measurement: the kernels that
dispatch chooses. `<!-- quote cpu FILE -->` is a file of `benchmarks/cpu.py` or `benchmarks/peer_llama_cpp.py`.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cpu
from benchmarks.gemm import MAIN_ROWS, MAIN_SHAPES
from benchmarks.kernel_table import kernel_table
from qjax.bench.cases import ROWS, SCHEMES, parse_rows, parse_schemes, parse_shapes
from qjax.bench.records import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- quote ([\w-]+) ([\w.-]+) -->\n).*?(<!-- end of quote -->)", re.DOTALL)

type Records = Sequence[dict[str, Any]]


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rows = [heads, ["---", *("--:" for _ in heads[1:])], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(records: Records, **wanted: Any) -> str:
    """`20.1 us, 2.31x` of the record that is asked for, or `-` where there is none."""
    found = [r for r in records if all(r[name] == value for name, value in wanted.items())]
    return f"{found[0]['us']:.1f} us, {found[0]['speedup']:.2f}x" if found else "-"


def by_shape(records: Records) -> str:
    """int4 in groups of 128, as dispatch chooses kernels: rows of x by shapes of the weight."""
    (scheme,) = parse_schemes("w4a16")
    shapes = parse_shapes(MAIN_SHAPES)
    lines = [
        [str(m), *(cell(records, scheme=str(scheme), backend="auto", m=m, n=n, k=k) for n, k in shapes)]
        for m in parse_rows(MAIN_ROWS)
    ]
    return table(["M", *(f"{n}x{k}" for n, k in shapes)], lines)


def _by_scheme(records: Records, backend: str, rows: Iterable[int], schemes: Iterable[str] = ()) -> str:
    """Schemes, the main ones if none are given, by rows of x, at the first of the main shapes."""
    (n, k), rows = parse_shapes(MAIN_SHAPES)[0], list(rows)
    lines = [
        [f"`{scheme}`", *(cell(records, scheme=scheme, backend=backend, m=m, n=n, k=k) for m in rows)]
        for scheme in schemes or map(str, parse_schemes(SCHEMES))
    ]
    return table([f"{n}x{k}", *(f"M = {m}" for m in rows)], lines)


def by_scheme(records: Records) -> str:
    """Every scheme, as dispatch chooses kernels."""
    return _by_scheme(records, "auto", parse_rows(MAIN_ROWS))


def weight_only(records: Records) -> str:
    """Every scheme of the file at every number of rows of it, at the first of the main shapes, as dispatch chooses."""
    return _by_scheme(records, "auto", sorted({r["m"] for r in records}), dict.fromkeys(r["scheme"] for r in records))


def by_rows(records: Records) -> str:
    """int4 in groups of 128 at every number of rows: Hopper's kernels and Triton's, whichever dispatch would choose."""
    (scheme,) = parse_schemes("w4a16")
    shapes = parse_shapes(MAIN_SHAPES)
    lines = [
        [
            str(m),
            *(
                cell(records, scheme=str(scheme), backend=backend, m=m, n=n, k=k)
                for n, k in shapes
                for backend in ("mosaic", "triton")
            ),
        ]
        for m in parse_rows(ROWS)
    ]
    heads = [f"{n}x{k}, {backend}" for n, k in shapes for backend in ("mosaic", "triton")]
    return table(["M", *heads], lines)


def triton(records: Records) -> str:
    """Every scheme on the Triton kernels, whichever kernel dispatch would choose."""
    return _by_scheme(records, "triton", parse_rows(ROWS))


def decode(records: Records) -> str:
    """Whole models: tokens a second of all rows, beside the dense model's."""
    batches = sorted({r["batch"] for r in records})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for r in records:
        gpus = f", {r['gpus']} GPUs" if r["gpus"] > 1 else ""
        cache = "" if r["cache"] == "dense" else f", {r['cache']} cache"
        said = f"{r['tok_s']:.0f} tok/s" + ("" if r["speedup"] is None else f", {r['speedup']:.2f}x")
        name = f"{r['model']}, {r['prompt']} tokens read{gpus}", f"`{r['scheme']}`{cache}"
        lines.setdefault(name, {})[r["batch"]] = said
    rows = [[*name, *(found.get(batch, "-") for batch in batches)] for name, found in lines.items()]
    return table(["model", "scheme", *(f"batch {batch}" for batch in batches)], rows)


def eight_bit(records: Records) -> str:
    """Weights and x of 8 bits: the library's products and what dispatch takes, at many and at few rows of x."""
    shapes = parse_shapes(MAIN_SHAPES)
    columns = [(2048, *shape, backend) for backend in ("cublaslt", "auto") for shape in shapes[:2]]
    columns += [(64, *shapes[0], backend) for backend in ("cublaslt", "auto")]
    lines = [
        [f"`{scheme}`", *(cell(records, scheme=scheme, backend=of, m=m, n=n, k=k) for m, n, k, of in columns)]
        for scheme in dict.fromkeys(r["scheme"] for r in records)
    ]
    return table(["scheme", *(f"{m}, {n}x{k}, {backend}" for m, n, k, backend in columns)], lines)


TABLES: dict[str, Callable[[Records], str]] = {
    "eight-bit": eight_bit,
    "by-shape": by_shape,
    "by-scheme": by_scheme,
    "weight-only": weight_only,
    "by-rows": by_rows,
    "triton": triton,
    "decode": decode,
}


KERNELS, CPU = "kernels", "cpu"
PICTURED = "by-shape"  # the table with the plot that `gemm.py --draw` makes below it


def source(document: dict[str, Any], file: Path, folder: Path) -> str:
    """Where a table is from, with a link from the folder of the page."""
    machine, link = document["machine"], os.path.relpath(file, folder)
    device = machine.get("processor") or f"NVIDIA {machine['device']}"
    return f"\n{device}, jax {machine['jax']}, revision {document['commit']}: [{file.name}]({link}).\n"


def picture(file: Path, folder: Path) -> str:
    """The plot beside a file of results, if there is one."""
    plot = file.with_suffix(".png")
    link = os.path.relpath(plot, folder)
    return f"\n![speedup over bfloat16 against rows of x, measured and predicted]({link})\n" if plot.is_file() else ""


def quoted(text: str, folder: Path, results: Path = RESULTS) -> str:
    """The text of a page that lies in `folder`, with every block made from what `results` has."""

    def block(found: re.Match[str]) -> str:
        begin, name, file, end = found.groups()
        if name == KERNELS:
            return f"{begin}{kernel_table()}{end}"
        path = results / file
        if not path.is_file():
            return found[0]
        if name == CPU:
            return f"{begin}{cpu.table(json.loads(path.read_text(encoding='utf-8')))}{end}"
        document = read(path)
        below = source(document, path, folder) + (picture(path, folder) if name == PICTURED else "")
        return f"{begin}{TABLES[name](document['records'])}{below}{end}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """The pages that may quote."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Rewrites the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    old = {page: page.read_text(encoding="utf-8") for page in pages()}
    differing = {page: new for page, text in old.items() if (new := quoted(text, page.parent)) != text}
    for page, new in differing.items():
        print(f"{page.relative_to(ROOT)}: {'says something else' if check else 'rewritten'}")
        if not check:
            page.write_text(new, encoding="utf-8")
    if check and differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
