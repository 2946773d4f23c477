"""Rounding to nearest costs pylm-4m what an independent implementation measured.

Perplexity and KL to the base over the first 40 windows of held-out text; `examples/pylm-4m/references.md` has the
formulas. Where scales are exact (powers of two, float16, absmax alone) the codes are the same, and only the order of
float32 sums differs. Elsewhere the last bit of a scale decides codes that lie half way: its section on ties allows
0.25 % for int4; quantized x moves with each rounding before it.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import qjax.nnx
from qjax.checkpoints.load import load
from qjax.models import Llama, load_tokenizer, perplexity

PYLM = Path(__file__).parents[2] / "examples" / "pylm-4m"
WINDOWS = 40
SAME_CODES = (1e-5, 1e-3)  # relative, of perplexity and of KL
SCALES_DIFFER = (2.5e-3, 0.02)
X_ROUNDED_TOO = (2e-3, 0.02)

# (scheme, the reference's name for it, tolerances)
CASES = [
    ("w4a16", "int4 g128 sym, f16 scales", SAME_CODES),
    pytest.param("w3a16:scale_dtype=float32", "int3 g128 asym", SAME_CODES, marks=pytest.mark.slow),
    pytest.param("mxfp4", "mxfp4", SAME_CODES, marks=pytest.mark.slow),
    pytest.param("nf4", "nf4 b64", SAME_CODES, marks=pytest.mark.slow),
    pytest.param("nvfp4", "nvfp4", SCALES_DIFFER, marks=pytest.mark.slow),
    pytest.param("w8a8_fp8", "w8a8 fp8 channel, x fp8 token", X_ROUNDED_TOO, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def base() -> Llama:
    return load(PYLM, dtype="float32")


@functools.cache
def references() -> dict[str, dict[str, Any]]:
    rows = json.loads((PYLM / "references.json").read_text(encoding="utf-8"))["round_to_nearest"]
    return {row["name"]: row for row in rows}


@functools.cache
def ids() -> tuple[int, ...]:
    text = (PYLM / "eval.txt").read_text(encoding="utf-8")
    return tuple(load_tokenizer(PYLM).encode(text, add_special_tokens=False))


@pytest.mark.parametrize(("scheme", "name", "tolerances"), CASES)
def test_perplexity_and_kl_are_the_references(
    scheme: str, name: str, tolerances: tuple[float, float], base: Llama
) -> None:
    model = qjax.nnx.quantize(load(PYLM, dtype="float32"), scheme)
    found = perplexity(model, ids(), base=base, max_windows=WINDOWS)
    wanted = references()[name]
    assert found.tokens == 20_440
    assert found.perplexity == pytest.approx(wanted["ppl"], rel=tolerances[0])
    assert found.kl == pytest.approx(wanted["kl_nats"], rel=tolerances[1])
    assert found.top1 == pytest.approx(wanted["top1_agreement"], abs=2e-3)
