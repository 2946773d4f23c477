"""What is a mixture worth? `qjax.search` on pylm-4m at three budgets, to nearest and with GPTQ, beside uniform schemes.

Layers are measured on the first 8 windows of 512 tokens of `calib.txt`, GPTQ calibrates on the first 128; perplexity,
KL to the base and top-1 agreement as in `accuracy.py`. Prints a row at a time, writes `results/search-<device>.json`.
"""

import json
import time
from collections import Counter
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

BUDGETS = (3.25, 4.25, 6.0)
GPTQ = "gptq:order=static,passes=4"  # what layers are tried with; then with outputs=float too

# Uniform schemes of at most as many bits, the best of each kind.
UNIFORM = (
    "w3a16",
    "w4a16:symmetric=false",
    "w4a16:group_size=64",
    "nf4:double_quant=true",
    "mxfp4",
    "w5a16:symmetric=false",
    "w5a16:group_size=32,symmetric=false",
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
    out = ROOT / "benchmarks" / "results" / file_name(f"search-{devices.current().name}")
    results: list[dict[str, Any]] = []

    def judge(model: Any, **row: Any) -> None:
        found = perplexity(model, ids, base=base, max_windows=WINDOWS)
        row |= dict(bytes=kernel_bytes(model), perplexity=found.perplexity, kl=found.kl, top1=found.top1)
        results.append(row)
        print(json.dumps(row), flush=True)
        document = {**environment(), "windows": WINDOWS, "base_perplexity": base_perplexity, "rows": results}
        out.write_text(json.dumps(document, indent=1) + "\n")

    for scheme in UNIFORM:
        judge(qjax.nnx.quantize(load(MODEL, dtype="float32"), scheme), scheme=scheme)
    for recipe in (None, GPTQ):
        start = time.perf_counter()
        found = qjax.search(base, windows(calib, count=8), budget_bits=BUDGETS[0], recipe=recipe)
        seconds = round(time.perf_counter() - start, 1)
        for bits in BUDGETS:
            mixed = found.within(bits=bits)
            model = load(MODEL, dtype="float32")
            if recipe is None:
                qjax.nnx.quantize(model, mixed.rules)
            else:
                qjax.calibrate(model, windows(calib), f"{recipe},outputs=float", mixed.rules)
            schemes = Counter(str(one.scheme) for one in mixed.choice)
            judge(
                model, budget_bits=bits, recipe=recipe, expected_kl=mixed.point.loss, seconds=seconds, schemes=schemes
            )


if __name__ == "__main__":
    main()
