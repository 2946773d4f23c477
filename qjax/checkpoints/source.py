"""What every reader of a foreign format works with: its settings, and the tensors of one module. Knows no format.

A format's `reader(files, settings)` gives a `Source`. What it takes from a folder is looked at before it is used:
dtype, shape and finite values against what the settings ask for, and every error names the file, the tensor or key,
what was found and what is allowed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.finite import count_bad
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

# Takes a module's name in the file; gives its weight and the names of the tensors that it is made of, or None where the
# module is not quantized. Every format has one.
type TensorReader = Callable[[str], tuple[QTensor, tuple[str, ...]] | None]

LARGEST = 2**31 - 1

# Repeats inside of what is repeated: matching one can take time exponential in the length of a name.
_NESTED = re.compile(r"[*+}][^()]*\)[*+{]")

SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Source:
    """A quantized folder, its settings read.

    Attributes:
      read: gives the weight of a module.
      marks: how the name of a tensor ends, after the module's, that only quantized modules have.
      beside: patterns of the names of tensors that belong to no Linear or embedding (scales of a KV cache).
      ours: whether it is QJAX's own, made for the mesh that it is loaded on.
      notes: what the settings ask for and QJAX does otherwise, in words; `explain` shows them.
    """

    read: TensorReader
    marks: tuple[str, ...]
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ours: bool = False


class Settings:
    """Typed access to a `quantization_config`; a null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = {key: value for key, value in values.items() if value is not None}
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as the file has it."""
        return self.values.get(key, default)

    def error(self, key: str, expected: str) -> CheckpointError:
        """That a key is missing, or has another value than the one `expected`."""
        if key not in self.values:
            return CheckpointError(f"{self.where}: key {key!r} is missing; expected {expected}")
        return CheckpointError(f"{self.where}: {key}={self.values[key]!r}; expected {expected}")

    def one_of(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """A value among those allowed, of the same type; an integer may be a string of digits."""
        allowed = tuple(allowed)
        value = self.get(key, default)
        if any(type(other) is int for other in allowed):
            value = _integer(value)
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise self.error(key, f"one of {', '.join(map(str, allowed))}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = _integer(self.get(key, default))
        if type(value) is not int or not 0 < value <= LARGEST:
            raise self.error(key, "a positive integer")
        return value

    def group_size(self, default: int | None = None) -> int | None:
        """Elements of K that share a scale; None (-1 in the file) is all of them."""
        key = "group_size"
        value = _integer(self.get(key, default))
        if value == -1 and type(value) is int:
            return None
        if type(value) is not int or not 0 < value <= LARGEST:
            raise self.error(key, "-1 (one group a row) or a positive integer")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; missing is empty."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)

    def part(self, key: str) -> "Settings | None":
        """The object under `key`, or None where it is missing or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Settings(value, f"{self.where}.{key}")

    def but(self, **changes: Any) -> "Settings":
        """The same with other values."""
        return Settings({**self.values, **changes}, self.where)


def _integer(value: Any) -> Any:
    """A string of digits as the number that it says, as some writers have them; all else as it is."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,10}", value):
        return int(value)
    return value


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression of a config matches the beginning of `name`."""
    if _NESTED.search(pattern):
        raise CheckpointError(f"{where}: {pattern!r} repeats a repetition; expected a simpler regular expression")
    try:
        return re.match(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _fits(got: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether a shape is the one asked for, and has elements."""
    return len(got) == len(wanted) and 0 not in got and all(b in (None, a) for a, b in zip(got, wanted, strict=True))


class ModuleTensors:
    """The tensors of one module of a folder. Those that were taken are remembered in `names`."""

    def __init__(self, files: CheckpointFiles, prefix: str, separator: str = ".") -> None:
        self.files = files
        self.prefix = prefix
        self.separator = separator
        self.names: list[str] = []

    def __contains__(self, suffix: object) -> bool:
        return isinstance(suffix, str) and self.name(suffix) in self.files

    def name(self, suffix: str) -> str:
        """The tensor's name in the file."""
        return f"{self.prefix}{self.separator}{suffix}"

    def where(self, suffix: str) -> str:
        """How errors name the tensor."""
        return f"{self.files.path}: tensor '{self.name(suffix)}'"

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.files.shape(self.name(suffix))

    def raw(
        self, suffix: str, dtypes: Iterable[str], shape: tuple[int | None, ...] | None = None, *, note: str = ""
    ) -> np.ndarray:
        """A tensor of one of `dtypes` and of `shape` (None is any length), whatever its values.

        Raises:
          CheckpointError: it is missing, or another; `note` says why the shape is asked for.
        """
        name, dtypes = self.name(suffix), tuple(dtypes)
        got, dtype = self.files.shape(name), self.files.dtype(name).name
        if dtype not in dtypes:
            raise CheckpointError(f"{self.where(suffix)}: dtype {dtype}; expected {' or '.join(dtypes)}")
        if shape is not None and not _fits(got, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(f"{self.where(suffix)}: shape {list(got)}; expected [{wanted}]{note and f' {note}'}")
        self.names.append(name)
        return self.files[name]

    def take(
        self, suffix: str, dtypes: Iterable[str], shape: tuple[int | None, ...] | None = None, *, note: str = ""
    ) -> np.ndarray:
        """As `raw`; the values of a float tensor are finite (those of float8 codes are looked at elsewhere)."""
        array = self.raw(suffix, dtypes, shape, note=note)
        if array.dtype.name in (*SCALES, "float8_e8m0fnu"):
            self.finite(suffix, array)
        return array

    def take_one(self, suffix: str, dtypes: Iterable[str]) -> np.ndarray:
        """A tensor of one element; files have it with one axis, two or none. Errors as `take`."""
        array = self.take(suffix, dtypes)
        if array.size != 1:
            raise CheckpointError(f"{self.where(suffix)}: shape {list(array.shape)}; expected one element")
        return array

    def finite(self, suffix: str, array: np.ndarray) -> None:
        """Refuses NaN and infinity."""
        if bad := count_bad(array):
            raise CheckpointError(f"{self.where(suffix)}: {bad} of {array.size} values are NaN or infinite")
