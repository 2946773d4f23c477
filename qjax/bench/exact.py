"""How far a product is from the exact one: that of its operands as they are after quantization, in float64.

Only up to 64 rows and 2048 columns are compared, spread evenly over all of them, so that the host keeps up.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activations import quantize_rows
from qjax.lookup import take_rows
from qjax.qtensor import QTensor

ROWS, COLUMNS = 64, 2048


class Error(NamedTuple):
    """`rel_err` is `||y - exact|| / ||exact||`; `err_ratio` is to the error of rounding `exact` to y's dtype."""

    rel_err: float
    err_ratio: float


def _some(size: int, most: int) -> np.ndarray:
    """Up to `most` indices below `size`, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int32))


def columns_of(w: QTensor) -> np.ndarray:
    """The compared columns of a weight, exactly dequantized: float64 `[K, C]`."""
    part = take_rows(dataclasses.replace(w, act_scale=None), jnp.asarray(_some(w.out_features, COLUMNS)))
    return np.asarray(part.dequantize(jnp.float32), np.float64)


def rows_of(x: jax.Array, w: QTensor) -> np.ndarray:
    """The compared rows of x as the product sees them, quantized where the scheme says so: float64 `[R, K]`."""
    whole = quantize_rows(x, w.scheme.activation, w.act_scale)
    return np.asarray(whole.dequantize()[_some(x.shape[0], ROWS)], np.float64)


def compare(y: jax.Array, rows: np.ndarray, columns: np.ndarray) -> Error:
    """The error of y `[M, N]`, given its compared rows of x and columns of w."""
    exact = rows @ columns
    at = np.ix_(_some(y.shape[0], ROWS), _some(y.shape[1], COLUMNS))
    found = np.asarray(y[at], np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(y.dtype), np.float64)
    error, least = (_distance(value, exact) for value in (found, rounded))
    return Error(error, error / least if least else float("inf"))


def _distance(y: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
