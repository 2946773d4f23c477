"""What do static scales of activations cost? Ranges of `qjax.calibrate` on pylm-4m, beside scales made from x itself.

Calibrated on the first 16 windows of 512 tokens of `calib.txt`; perplexity, KL to the base and top-1 agreement as in
`accuracy.py`. Prints a row at a time and writes `results/act-scale-<device>.json`.
"""

import json
from typing import Any

from accuracy import MODEL, ROOT, WINDOWS, environment

import qjax
import qjax.nnx
from qjax import devices
from qjax.calibration import windows
from qjax.checkpoints.load import load
from qjax.dispatch.tuning import file_name
from qjax.models import load_tokenizer, perplexity

# Scheme, and the range of static scales; None where they are dynamic.
ROWS: tuple[tuple[str, Any], ...] = (
    ("w8a8_int8", None),
    ("w8a8_int8:activation=tensor", None),
    ("w8a8_int8:mode=static", "max"),
    ("w8a8_int8:mode=static", "mse"),
    ("w8a8_int8:mode=static", 99.99),
    ("w8a8_fp8", None),
    ("w8a8_fp8:mode=static", "max"),
    ("w8a8_fp8:mode=static", "mse"),
)


def main() -> None:
    """Runs every row, prints as it goes, writes the results."""
    tokenizer = load_tokenizer(MODEL)
    calib, ids = (
        tokenizer.encode((MODEL / name).read_text(encoding="utf-8"), add_special_tokens=False)
        for name in ("calib.txt", "eval.txt")
    )
    base = load(MODEL, dtype="float32")
    out = ROOT / "benchmarks" / "results" / file_name(f"act_scale-{devices.current().name}")
    results: list[dict[str, Any]] = []
    for scheme, how in ROWS:
        model = load(MODEL, dtype="float32")
        if how is None:
            qjax.nnx.quantize(model, scheme)
        else:
            qjax.calibrate(model, windows(calib, count=16), "nearest", scheme, act_scale=how)
        found = perplexity(model, ids, base=base, max_windows=WINDOWS)
        row = dict(scheme=scheme, act_scale=how, perplexity=found.perplexity, kl=found.kl, top1=found.top1)
        results.append(row)
        print(json.dumps(row), flush=True)
        document = {**environment(), "windows": WINDOWS, "rows": results}
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
