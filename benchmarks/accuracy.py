"""Does rounding to nearest cost what it should? Every scheme on pylm-4m against an independent implementation.

Perplexity, KL to the base and top-1 agreement over the first 40 windows of held-out text, in float32, as
`examples/pylm-4m/references.md` defines them. Prints a table and writes `results/accuracy-<device>.json`.
"""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import qjax
import qjax.nnx
from qjax import devices
from qjax.checkpoints.load import load
from qjax.cli.opening import kernel_bytes
from qjax.cli.tables import show
from qjax.dispatch.tuning import file_name
from qjax.models import load_tokenizer, perplexity

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "pylm-4m"
WINDOWS = 40

F32 = "scale_dtype=float32"
EMBEDDING = "embed_tokens"

# What we run (a scheme or rules), and the reference's name for it, where it has one. Grouped integers without F32 have
# float16 scales.
ROWS: tuple[tuple[Any, str | None], ...] = (
    ("w8a16", "int8 channel sym"),
    ("w8a16:symmetric=false", None),
    (f"w8a16:group_size=128,{F32}", "int8 g128 sym"),
    ("w6a16", None),
    ("w6a16:symmetric=false", None),
    ("w5a16", None),
    ("w5a16:symmetric=false", None),
    ("w4a16:group_size=-1", "int4 channel sym"),
    ("w4a16:group_size=16", None),
    (f"w4a16:group_size=32,{F32}", "int4 g32 sym"),
    ("w4a16:group_size=32", "int4 g32 sym"),
    (f"w4a16:group_size=64,{F32}", "int4 g64 sym"),
    (f"w4a16:group_size=128,{F32}", "int4 g128 sym"),
    ("w4a16", "int4 g128 sym, f16 scales"),
    (f"w4a16:group_size=64,symmetric=false,{F32}", "int4 g64 asym"),
    ("w4a16:group_size=64,symmetric=false", "int4 g64 asym"),
    (f"w4a16:symmetric=false,{F32}", "int4 g128 asym"),
    ("w4a16:symmetric=false", "int4 g128 asym"),
    (f"w3a16:group_size=64,{F32}", "int3 g64 asym"),
    (f"w3a16:{F32}", "int3 g128 asym"),
    ("w3a16", "int3 g128 asym"),
    ("w3a16:symmetric=true", None),
    (f"w2a16:group_size=32,{F32}", "int2 g32 asym"),
    (f"w2a16:{F32}", "int2 g64 asym"),
    ("w2a16", "int2 g64 asym"),
    ("w2a16:symmetric=true", None),
    ("fp8:granularity=tensor", "fp8 e4m3 tensor"),
    ("fp8", "fp8 e4m3 channel"),
    ("fp8:granularity=block", "fp8 e4m3 block"),
    ("fp8:format=e5m2", "fp8 e5m2 channel"),
    ("nf4", "nf4 b64"),
    ("nf4:double_quant=true", "nf4 b64 double"),
    ("fp4", "fp4 bnb b64"),
    ("fp4:double_quant=true", "fp4 bnb b64 double"),
    ("mxfp4", "mxfp4"),
    ("mxfp8", "mxfp8 e4m3"),
    ("mxfp8:format=e5m2", None),
    ("nvfp4", "nvfp4"),
    ("higgs", None),
    ("higgs:p=2", None),
    ("higgs:bits=3", None),
    ("higgs:bits=3,p=2", None),
    ("higgs:bits=2,p=2", None),
    ("w8a8_int8", "w8a8 int8 channel, x int8 token"),
    ("w8a8_fp8", "w8a8 fp8 channel, x fp8 token"),
    ("w8a8_fp8:granularity=tensor", "w8a8 fp8 tensor, x fp8 token"),
    ("w8a8_fp8:granularity=block,activation=block", None),
    ("w4a8_int8", "w4a8 int4 g128 sym, x int8 token"),
    ({EMBEDDING: "w8a16"}, "embedding+head int8 row"),
    ({EMBEDDING: f"w4a16:group_size=64,{F32}"}, "embedding+head int4 g64 sym"),
    ({EMBEDDING: "w8a16", ".*": f"w4a16:{F32}"}, "int4 g128 sym + embedding int8 row"),
)


def measure(rules: Any, ids: list[int], base: Any) -> dict[str, Any]:
    """One scheme (or rules) on a fresh copy of the model."""
    model = qjax.nnx.quantize(load(MODEL, dtype="float32"), rules)
    found = perplexity(model, ids, base=base, max_windows=WINDOWS)
    name = rules if isinstance(rules, str) else "; ".join(f"{pattern} {scheme}" for pattern, scheme in rules.items())
    return {
        "scheme": name,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "bytes": kernel_bytes(model),
    }


def environment() -> dict[str, str]:
    """Machine, versions and revision."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    here = {"device": devices.current().name, "machine": platform.machine(), "python": platform.python_version()}
    return {**here, **versions, "qjax": qjax.__version__, "revision": git.stdout.strip()}


def cells_of(row: dict[str, Any], base_perplexity: float) -> tuple[str, ...]:
    """One row of the table; the reference's cells are empty where it has none."""
    reference, off_by, reference_kl = "", "", ""
    if "reference" in row:
        reference = f"{row['reference_perplexity']:.4f}"
        off_by = f"{100 * (row['perplexity'] / row['reference_perplexity'] - 1):+.3f} %"
        reference_kl = f"{row['reference_kl']:.5f}"
    change = f"{100 * (row['perplexity'] / base_perplexity - 1):+.3f} %"
    return (
        row["scheme"],
        f"{row['bytes']:,}",
        f"{row['perplexity']:.4f}",
        change,
        reference,
        off_by,
        f"{row['kl']:.5f}",
        reference_kl,
        f"{100 * row['top1']:.2f} %",
    )


def main() -> None:
    """Runs every row, prints as it goes, writes the results."""
    references = {row["name"]: row for row in json.loads((MODEL / "references.json").read_text())["round_to_nearest"]}
    text = (MODEL / "eval.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(MODEL).encode(text, add_special_tokens=False)
    base = load(MODEL, dtype="float32")
    base_perplexity = perplexity(base, ids, max_windows=WINDOWS).perplexity
    results: list[dict[str, Any]] = []
    for rules, name in ROWS:
        row = measure(rules, ids, base)
        if name is not None:
            wanted = references[name]
            row |= {"reference": name, "reference_perplexity": wanted["ppl"], "reference_kl": wanted["kl_nats"]}
        results.append(row)
        print(json.dumps(row), flush=True)
    cells = [cells_of(row, base_perplexity) for row in results]
    columns = ("scheme", "bytes", "perplexity", "change", "reference", "off by", "KL", "reference KL", "top-1")
    show(columns, cells, title=f"base {base_perplexity:.4f}, {devices.current()}", right=columns[1:])
    out = ROOT / "benchmarks" / "results" / file_name(f"accuracy-{devices.current().name}")
    out.parent.mkdir(exist_ok=True)
    document = {**environment(), "windows": WINDOWS, "base_perplexity": base_perplexity, "rows": results}
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
