"""The checks of `kernel_checks` pass a right kernel and find a wrong one, on any machine; hammer and sanitizer too."""

import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_layer import Layer
from gpu import attention_checks, hammer, layer_checks
from gpu.kernel_checks import Case, check, compile_case, quantization
from gpu.kernel_selection import rehearsed
from gpu.sanitizer import Sanitizer
from products import Product

from qjax.activations import Rows, quantize_rows
from qjax.dispatch.routes import Route
from qjax.schemes import Activation


@pytest.mark.parametrize("case", rehearsed(seed=0), ids=str)
def test_the_reference_passes(case: Case) -> None:
    wrong, made = check(case, compile_case(case, with_graph=False))
    assert not wrong
    assert made >= {"accuracy", "repeatability", "rows"}


def right(x: Any, packed: Any, scale: Any, *, out_dtype: Any, **_: Any) -> Any:
    """A product with weights of 8 bits and a scale a row."""
    w = packed.astype(jnp.float32) * scale.astype(jnp.float32)
    return (x.astype(jnp.float32) @ w.T).astype(out_dtype)


def unscaled(x: Any, packed: Any, scale: Any, **others: Any) -> Any:
    return right(x, packed, jnp.full_like(scale, scale[0, 0]), **others)


def rounded(x: Any, packed: Any, scale: Any, **others: Any) -> Any:
    w = (packed.astype(jnp.float32) * scale).astype(jnp.bfloat16)
    return right(x, w, jnp.ones_like(scale), **others)


def leaking(*args: Any, **others: Any) -> Any:
    y = right(*args, **others)
    return y + 1e-30 * y[:1]  # in the last bits of no row but where others hold NaN


def unwritten(*args: Any, **others: Any) -> Any:
    return right(*args, **others).at[-1, -1].set(jnp.nan)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (right, None),
        (unscaled, "times as far off as allowed"),
        (rounded, "times that of rounding"),
        (leaking, "changes with the other rows of x"),
        (unwritten, "1 of 333 elements are not finite"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_wrong_kernel_is_found(kernel: Callable[..., Any], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kernel_under_test")
    module.matmul = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    case = Case(Route("xla.under_test", "xla", module.__name__), Product("w8a16", 9, 200, 37), 0)
    wrong, _ = check(case, compile_case(case, with_graph=False))
    assert (not wrong) if said is None else said in "; ".join(wrong)


@pytest.mark.parametrize("format", ["int8", "e4m3"])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_codes_of_x_that_are_not_the_nearest_are_found(format: str, granularity: str) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 200)).astype(jnp.bfloat16)
    rows = jax.tree.map(np.asarray, quantize_rows(x, Activation(format, granularity), None))
    assert not list(quantization(x, rows))
    wrong = np.array(rows.values)
    wrong[1, 7] = wrong[1, 8]
    assert "steps off" in next(quantization(x, Rows(wrong, rows.scale)))
    assert "steps off" in next(quantization(x, Rows(rows.values, 1.1 * rows.scale)))


def test_hammered_products_keep_their_bits_on_every_device() -> None:
    found = hammer.hammered(hammer.REHEARSED, seconds=0.5, threads=2)
    assert not found["wrong"] and not found["absent"]
    assert found["devices"] == jax.device_count() and found["threads"] == 2 * jax.device_count() + 1
    assert found["runs"] >= found["executables"] == 2 * (jax.device_count() + 1)


def test_a_result_with_other_bits_is_counted() -> None:
    results = iter([1.0, 2.0, 1.0])
    job = hammer.Job("product", lambda _: (jnp.full((1, 2), next(results, 1.0)), None), [0, 0], [])
    first = hammer.bits(np.ones((1, 2), np.float32))
    runs, wrong = hammer.hammer([hammer.Job(job.name, job.run, job.given, [first, first])], 0, 0.2)
    assert runs["product"] > 2 and wrong == Counter(product=1)


TOOL = """#!/bin/sh
for last; do number=$last; done
while [ $number -lt 4 ]; do
  echo "begins $number case $number"
  [ $number = 1 ] && [ -n "$DIES" ] && echo "Internal Sanitizer Error" && exit 99
  [ $number = 1 ] && kill -SEGV $$
  echo "case $number done"
  number=$((number + 1))
done
exit ${CODE:-0}
"""


@pytest.mark.parametrize(("code", "said"), [("0", []), ("99", ["errors: "])])
def test_a_sanitizer_that_dies_names_the_case_and_goes_on_behind_it(code, said, tmp_path, monkeypatch) -> None:
    tool = Path(tmp_path) / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CODE", code)
    sanitizer = Sanitizer("racecheck", 0)
    wrong, skipped = sanitizer.outcome(20)
    assert skipped is None and len(wrong) == 1 + len(said)
    assert wrong[0].startswith("exit code -11 after ['begins 1 case 1']")
    assert all(text.startswith(start) for text, start in zip(wrong[1:], said, strict=True))
    assert "case 3 done" in " ".join(sanitizer._lines())


def test_a_sanitizer_that_dies_with_the_code_of_errors_goes_on_too(tmp_path, monkeypatch) -> None:
    tool = Path(tmp_path) / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("DIES", "yes")
    sanitizer = Sanitizer("racecheck", 0)
    wrong, skipped = sanitizer.outcome(20)
    assert skipped is None and len(wrong) == 1
    assert wrong[0].startswith("exit code 99 after ['begins 1 case 1']")
    assert "case 3 done" in " ".join(sanitizer._lines())


@pytest.mark.parametrize("kind", [None, "int8", "float8_e4m3fn"])
def test_attention_that_is_right_passes_and_another_window_is_found(kind: str | None) -> None:
    case = attention_checks.AttentionCase(4, 2, 16, 48, kind=kind, window=7)
    assert not attention_checks.check_attention(case, interpret=True)
    (said,) = attention_checks.check_attention(case, interpret=True, window=8)
    assert "a result is" in said


def test_a_layer_that_is_right_passes_and_another_epsilon_is_found() -> None:
    layer = Layer("w4a16", 2, 128, 128, 128, 64)
    assert not layer_checks.check_layer(layer, interpret=True, sms=2)
    said = layer_checks.check_layer(layer, interpret=True, sms=2, epsilon=0.1)
    assert any("half ulps off" in text for text in said)
