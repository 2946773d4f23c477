"""The checks of `kernel_checks` pass a right kernel and find a wrong one, on any machine."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.kernel_checks import Case, check, compile_case, quantization
from gpu.kernel_selection import rehearsed
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
