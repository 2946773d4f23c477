"""QJAX's main job on a small, real model: `make demo` quantizes pylm-4m to every format and shows what that costs.

One table (bytes, perplexity on held-out text, KL to the original, tokens a second, the kernel that ran), a plot of the
same, and a few lines that the int4 model writes. A minute and a quarter on two CPU cores.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import rich.progress

import qjax
import qjax.nnx
from qjax.checkpoints.load import load
from qjax.cli.opening import kernel_bytes
from qjax.cli.tables import show
from qjax.explain import explain
from qjax.models import Llama, Tokenizer, generate, load_tokenizer, perplexity

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "pylm-4m"
PLOT = ROOT / "build" / "demo.png"

WINDOWS = 40  # of 512 tokens
NEW_TOKENS = 64
PROMPTS = (
    'class Error(Exception):\n    """Base class',
    "import unittest\n\nclass TestList(unittest.TestCase):\n\n    def test_append(self):\n",
)

# What the table calls it, and how it is written; None is the model as it is.
SCHEMES: dict[str, str | None] = {
    "bf16": None,
    "int8": "w8a16",
    "fp8 e4m3": "fp8",
    "int4 g128": "w4a16",
    "int4 g32": "w4a16:group_size=32",
    "nf4": "nf4",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "int8, x int8": "w8a8_int8",
}
WRITES = "int4 g128"


@dataclass(frozen=True)
class Measured:
    """One row: a model's kernels in bytes, its distance to the original, its speed, and what ran it."""

    name: str
    bytes: int
    perplexity: float
    kl: float
    tokens_per_second: float
    kernel: str


def measure(name: str, model: Llama, base: Llama, ids: list[int], prompt: list[int]) -> Measured:
    """Perplexity over the first windows of `ids`, and the speed of a second continuation of `prompt`."""
    found = perplexity(model, ids, base=None if model is base else base, max_windows=WINDOWS)
    generate(model, [prompt], max_new_tokens=NEW_TOKENS)  # compiles
    start = time.perf_counter()
    generate(model, [prompt], max_new_tokens=NEW_TOKENS)
    rate = NEW_TOKENS / (time.perf_counter() - start)
    kernels = dict.fromkeys(row.kernel for row in explain(model).rows)
    return Measured(name, kernel_bytes(model), found.perplexity, found.kl or 0.0, rate, ", ".join(kernels))


def table(rows: list[Measured], device: str) -> None:
    """Every row against the first, which is the original."""
    first = rows[0]
    columns = ("scheme", "bytes", "ratio", "perplexity", "change", "KL", "tok/s", "faster", "kernel")
    cells = [
        (
            row.name,
            f"{row.bytes:,}",
            f"{first.bytes / row.bytes:.2f}x",
            f"{row.perplexity:.3f}",
            f"{100 * (row.perplexity / first.perplexity - 1):+.2f} %",
            f"{row.kl:.5f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.tokens_per_second / first.tokens_per_second:.2f}x",
            row.kernel,
        )
        for row in rows
    ]
    notes = (
        f"bytes of the 28 projections; perplexity of {WINDOWS} x 512 tokens of held-out text; KL to bf16 (nats);",
        "tok/s of one sequence, and against the first row. xla.reference runs everywhere and decodes at each call.",
    )
    show(columns, cells, title=f"pylm-4m, round to nearest, on {device}", right=columns[1:-1], notes=notes)


def plot(rows: list[Measured], weights: int) -> None:
    """Bits a weight against the change in perplexity, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for rank, row in enumerate(sorted(rows, key=lambda row: (8 * row.bytes // weights, row.perplexity))):
        bits, change = 8 * row.bytes / weights, 100 * (row.perplexity / rows[0].perplexity - 1)
        axes.plot(bits, change, "o", color="tab:blue")
        side = {"ha": "left", "xytext": (7, 0)} if rank % 2 else {"ha": "right", "xytext": (-7, 0)}
        axes.annotate(row.name, (bits, change), textcoords="offset points", va="center", **side)
    axes.set_title("pylm-4m, round to nearest")
    axes.set_xlabel("bits a weight, scales counted")
    axes.set_ylabel("change in perplexity, %")
    axes.grid(alpha=0.3)
    axes.margins(x=0.18, y=0.12)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def write_lines(model: Llama, tokenizer: Tokenizer) -> None:
    """A few lines of the model's own."""
    for prompt in PROMPTS:
        (new,) = generate(model, [tokenizer.encode(prompt)], max_new_tokens=NEW_TOKENS)
        print("-" * 80)
        print(prompt + tokenizer.decode(new).rstrip())


def main() -> None:
    """Measures every scheme, then shows table, plot and text."""
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer.encode((MODEL / "eval.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    prompt = tokenizer.encode(PROMPTS[0])
    base = load(MODEL)
    models = {name: base for name in SCHEMES}
    rows = []
    for name, scheme in rich.progress.track(SCHEMES.items(), description="quantizing, measuring"):
        if scheme is not None:
            models[name] = qjax.nnx.quantize(load(MODEL), scheme, progress=False)
        rows.append(measure(name, models[name], base, ids, prompt))
    table(rows, str(explain(base).device))
    plot(rows, weights=rows[0].bytes // 2)
    print(f"\nplot: {PLOT.relative_to(ROOT)}\nthe {WRITES} model writes:")
    write_lines(models[WRITES], tokenizer)


if __name__ == "__main__":
    main()
