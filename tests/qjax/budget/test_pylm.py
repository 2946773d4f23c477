"""What a search is worth on a real model: held-out text, against every uniform scheme of no more bytes."""

from pathlib import Path

import pytest

import qjax
import qjax.nnx
from qjax.calibration import windows
from qjax.models import perplexity

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"


@pytest.fixture(scope="module")
def texts():
    """What is measured on, and what is judged by."""
    tokenizer = qjax.load_tokenizer(PYLM)
    calib, held_out = (
        tokenizer.encode((PYLM / name).read_text(encoding="utf-8"), add_special_tokens=False)
        for name in ("calib.txt", "eval.txt")
    )
    return windows(calib, count=4), held_out


# Bits, uniform schemes of no more of them, and what the mixture lost when this was written.
CASES = [
    (3.25, ["w3a16"], 0.185),
    (4.25, ["w4a16", "w4a16:symmetric=false", "w4a16:group_size=64", "nf4:double_quant=true", "mxfp4"], 0.0285),
    (6.0, ["w5a16:symmetric=false", "w5a16:group_size=32"], 0.0031),
]


@pytest.mark.slow
def test_a_mixture_beats_every_uniform_scheme_of_no_more_bytes(texts):
    calib, held_out = texts
    base = qjax.load(PYLM)

    def judged(rules):
        return perplexity(qjax.nnx.quantize(qjax.load(PYLM), rules), held_out, base=base, max_windows=40)

    found = qjax.search(base, calib, budget_bits=4.25)
    for bits, uniform, most_kl in CASES:
        mixed = judged(found.within(bits=bits).rules)
        assert mixed.kl < most_kl
        for scheme in uniform:
            other = judged(scheme)
            assert mixed.kl < other.kl and mixed.perplexity < other.perplexity, (bits, scheme)
