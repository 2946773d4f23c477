"""PTX that decodes codes, run in NumPy over every code at every place."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from ptx import both, pair_of, run

from pallas_kernels import pairs

DTYPES = ("bfloat16", "float16")
LOW, HIGH = (a.ravel().astype(np.uint32) for a in np.meshgrid(np.arange(16), np.arange(16)))  # every pair of nibbles
OTHER = np.uint32(0x5A3C96E1)  # what lies in a word's other nibbles or bytes
BYTE_LOW, BYTE_HIGH = (a.ravel().astype(np.uint32) for a in np.meshgrid(np.arange(256), np.arange(256)))


def _nibbles_at(place: int) -> np.ndarray:
    mask = np.uint32(0x000F000F << (4 * place))
    return (OTHER & ~mask) | (LOW | HIGH << np.uint32(16)) << np.uint32(4 * place)


def _bytes_at(second: int) -> np.ndarray:
    shift = np.uint32(16 * second)
    return (OTHER & ~np.uint32(0xFFFF << (16 * second))) | (BYTE_LOW | BYTE_HIGH << np.uint32(8)) << shift


def _codes(dtype: str) -> np.ndarray:
    """The values of all bytes."""
    return np.arange(256, dtype=np.uint8).view(np.int8 if dtype == "int8" else jnp.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize(("place", "dtype"), [*itertools.product(range(4), DTYPES)])
@pytest.mark.parametrize("weight", ["int4", *pairs.TABLES])
def test_a_nibble_is_its_value(weight: str, place: int, dtype: str) -> None:
    found = pair_of(run(pairs.pair(place, weight, dtype, None), _nibbles_at(place)), dtype)
    table = np.arange(16.0) - 8 if weight == "int4" else np.array(pairs.TABLES[weight], np.float32)
    table = table.astype(np.dtype(dtype)).astype(np.float64)
    np.testing.assert_array_equal(found, np.stack([table[LOW], table[HIGH]], -1))


@pytest.mark.parametrize(("place", "dtype"), [*itertools.product(range(4), DTYPES)])
def test_a_nibble_less_a_zero_point(place: int, dtype: str) -> None:
    for zero in range(16):
        less = both(-pairs.MAGIC[dtype][1] - zero, dtype)
        found = pair_of(run(pairs.pair(place, "int4", dtype, "$2"), _nibbles_at(place), less), dtype)
        np.testing.assert_array_equal(found, np.stack([LOW, HIGH], -1).astype(np.float64) - zero)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("scale", [2.0**-9 - 2.0**-17, 2.0**-10, 1.2345 * 2.0**-10, 1.9 * 2.0**-14, 2.0**-19, 0.0])
def test_a_nibble_that_is_a_subnormal_number_is_scaled_and_rounded_once(place: int, scale: float) -> None:
    raised = both(scale * 2.0 ** pairs.RAISED["int4"], "float16")
    exact = pair_of(raised, "float16")[..., 0] * 2.0 ** -pairs.RAISED["int4"]
    found = pair_of(run(pairs.scaled_code(place), _nibbles_at(place), raised), "float16")
    wanted = ((np.stack([LOW, HIGH], -1).astype(np.float64) - 8) * exact).astype(np.float16)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("second", "dtype"), [*itertools.product(range(2), DTYPES)])
@pytest.mark.parametrize("weight", ["int8", "e4m3"])
def test_a_byte_is_its_value(weight: str, second: int, dtype: str) -> None:
    found = pair_of(run(pairs.byte_pair(second, weight, dtype), _bytes_at(second)), dtype)
    _same_numbers(found, np.stack([_codes(weight)[BYTE_LOW], _codes(weight)[BYTE_HIGH]], -1))


@pytest.mark.parametrize("second", range(2))
@pytest.mark.parametrize("mantissa", [1.0, 1.2345, 1.998])
@pytest.mark.parametrize(("weight", "largest"), [("int8", -10), ("e4m3", 6)])
def test_a_byte_is_scaled_and_rounded_once(weight: str, largest: int, mantissa: float, second: int) -> None:
    for exponent in (largest, largest - 5):
        raised = both(mantissa * 2.0 ** (exponent + pairs.RAISED[weight]), "float16")
        exact = pair_of(raised, "float16")[..., 0] * 2.0 ** -pairs.RAISED[weight]
        found = pair_of(run(pairs.scaled_byte_pair(second, weight), _bytes_at(second), raised), "float16")
        wanted = (np.stack([_codes(weight)[BYTE_LOW], _codes(weight)[BYTE_HIGH]], -1) * exact).astype(np.float16)
        _same_numbers(found, wanted.astype(np.float64))


def _same_numbers(found: np.ndarray, wanted: np.ndarray) -> None:
    """e4m3 has a NaN, of which kernels make a number: they are not given any."""
    some = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[some], wanted[some])
