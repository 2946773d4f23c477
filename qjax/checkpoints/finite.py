"""NaN and infinity in arrays of every float type, told by their bits, since types of eight bits have no fast test."""

import numpy as np

_VALUES = 1 << 18  # looked at a time

# Bits that are all ones in NaN and infinity, and only there; in NaN, where a type has no infinity.
_EXPONENTS = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
    "float8_e8m0fnu": 0xFF,
}


def count_bad(array: np.ndarray) -> int:
    """How many values are NaN or infinite; none of an array of integers."""
    ones = _EXPONENTS.get(array.dtype.name)
    if ones is None:
        return 0
    size = array.dtype.itemsize
    bits = array.view(f"u{size}").ravel("K")  # as it lies: a transpose is not copied
    mask = bits.dtype.type(ones)
    chunks = (bits[start : start + _VALUES] for start in range(0, bits.size, _VALUES))
    return sum(int(np.count_nonzero((chunk & mask) == mask)) for chunk in chunks)
