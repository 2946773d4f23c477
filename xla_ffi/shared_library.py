"""Finds the shared library of a folder's handlers, which `scripts/build-ffi` makes, and loads it."""

import ctypes
import pathlib
from typing import Any


def opened(path: pathlib.Path, **results: Any) -> ctypes.CDLL | str:
    """The library at `path`; or why there is none, in words for a user.

    Args:
      results: ctypes of what its functions return, by their names, where that is no `int`.
    """
    if not path.exists():
        return f"{path.name} is not built: `make setup` in a clone builds it, with g++"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load here: {error}"
    for name, result in results.items():
        getattr(library, name).restype = result
    return library


def needed(library: ctypes.CDLL | str) -> ctypes.CDLL:
    """The library that `opened` gave; RuntimeError with its words where it gave none."""
    if isinstance(library, str):
        raise RuntimeError(library)
    return library
