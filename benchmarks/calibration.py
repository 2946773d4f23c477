"""What does calibration give back? Recipes on pylm-4m, beside an independent implementation where it has the method.

Calibrated on the first 128 windows of 512 tokens of `calib.txt`; perplexity, KL to the base and top-1 agreement over
the first 40 windows of held-out text, in float32, as `examples/pylm-4m/references.md` defines them. Prints a row at a
time and writes `results/calibration-<device>.json`.
"""

import json
import time
from typing import Any

from accuracy import MODEL, ROOT, WINDOWS, environment

import qjax
import qjax.nnx
from qjax import devices
from qjax.calibration import windows
from qjax.checkpoints.load import load
from qjax.cli.opening import kernel_bytes
from qjax.dispatch.tuning import file_name
from qjax.models import load_tokenizer, perplexity

INT4, BEST = "w4a16:symmetric=false", "passes=4,outputs=float"

# Scheme, recipe, and the reference's name for it, where it has one.
ROWS: tuple[tuple[str, str, str | None], ...] = (
    (INT4, f"gptq:{BEST}", None),
    (INT4, f"gptq:order=static,{BEST}", None),
    ("w3a16", f"gptq:order=static,{BEST}", None),
    ("w4a16", f"gptq:{BEST}", None),
    (INT4, "awq", "awq int4 g128 asym"),
    ("w8a8_int8", "smoothquant", "smoothquant 0.5 w8a8 int8 channel/token"),
    (INT4, "mse", None),
    (INT4, "hqq", None),
    *(
        (scheme, recipe, f"gptq {name} act-order")
        for scheme, name in ((INT4, "int4 g128 asym"), ("w4a16", "int4 g128 sym"), ("w3a16", "int3 g128 asym"))
        for recipe in ("gptq", "gptq:clip=false")
    ),
    ("w3a16", f"gptq:{BEST}", None),
    (INT4, "awq:rounding=gptq", None),
    (INT4, "gptq:order=static", "gptq int4 g128 asym act-order, static groups"),
    ("w4a16", "gptq:order=static", "gptq int4 g128 sym act-order, static groups"),
    ("w4a16", f"gptq:order=static,{BEST}", None),
)


def main() -> None:
    """Runs every row, prints as it goes, writes the results."""
    tokenizer = load_tokenizer(MODEL)
    calib, ids = (
        tokenizer.encode((MODEL / name).read_text(encoding="utf-8"), add_special_tokens=False)
        for name in ("calib.txt", "eval.txt")
    )
    base = load(MODEL, dtype="float32")
    base_perplexity = perplexity(base, ids, max_windows=WINDOWS).perplexity
    out = ROOT / "benchmarks" / "results" / file_name(f"calibration-{devices.current().name}")
    references = {row["name"]: row for row in json.loads((MODEL / "references.json").read_text())["calibrated"]}
    results: list[dict[str, Any]] = []
    for scheme, recipe, name in ROWS:
        start = time.perf_counter()
        model = qjax.calibrate(load(MODEL, dtype="float32"), windows(calib), recipe, scheme)
        seconds = time.perf_counter() - start
        found = perplexity(model, ids, base=base, max_windows=WINDOWS)
        row = dict(scheme=scheme, recipe=recipe, perplexity=found.perplexity, kl=found.kl, top1=found.top1)
        row |= dict(bytes=kernel_bytes(model), seconds=round(seconds, 1))
        if name is not None:
            wanted = references[name]
            row |= dict(reference=name, reference_perplexity=wanted["ppl"], reference_kl=wanted["kl_nats"])
        results.append(row)
        print(json.dumps(row), flush=True)
        document = {**environment(), "windows": WINDOWS, "base_perplexity": base_perplexity, "rows": results}
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
