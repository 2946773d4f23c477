"""A local folder of safetensors files and JSON, opened as lazy arrays.

Enters a path; leave validated tensors (memory mapped, one at a time) and parsed JSON. Everything a
file claims is checked against the file's true size before a byte is allocated for it. Pickle files
are refused. Knows nothing of any model or quantization format.
"""

import bisect
import functools
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Names of the safetensors format (its README and `safetensors/src/tensor.rs`).
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of `file`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class CheckpointFiles:
    """A checked folder. `files[name]` is a read-only view of the mapped file, made when asked for.

    Nothing is read before it is asked for, and dropping the view unmaps it, so that streaming
    through a folder holds one tensor at a time.
    """

    path: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "CheckpointFiles":
        """Open the folder `path`: config.json and model.safetensors, or the shards an index names.

        Where neither is there, the only safetensors file or index of another name is taken.

        Raises:
          CheckpointError: the folder, its JSON, its index or a safetensors header is missing,
            malformed, truncated, points outside the folder, or holds only pickle files. Names the
            file, the tensor, expected and got.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder}: {what}; expected a local checkpoint folder")
        names = sorted(file.name for file in folder.iterdir() if file.name[0] != ".")
        if not names:
            raise CheckpointError(f"{folder}: the folder is empty; expected {CONFIG} and {SINGLE} or {INDEX}")
        entries = _folder_entries(folder, names)
        if CONFIG not in names:
            raise CheckpointError(f"{folder}: no {CONFIG}; the folder has {_listing(names)}")
        return cls(folder, read_json(folder / CONFIG), entries)

    @functools.cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.entries)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return self._sorted[:]

    def names_in(self, module: str) -> list[str]:
        """Those that begin with the module's name and a dot, sorted."""
        first, end = (bisect.bisect_left(self._sorted, f"{module}{mark}") for mark in "./")  # "/" follows "."
        return self._sorted[first:end]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """Where `name` lies. Raises CheckpointError where the folder has no such tensor."""
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing; the folder has {_listing(self._sorted)}"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor, from the header."""
        return self.entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of the tensor, from the header; ml_dtypes' for bfloat16 and the float8 types."""
        return self.entry(name).dtype

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entry(name)
        if entry.start == entry.stop:  # an empty range cannot be mapped
            return np.empty(entry.shape, entry.dtype)
        offset = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb", buffering=0) as file:
            mapped = mmap.mmap(file.fileno(), entry.stop - offset, access=mmap.ACCESS_READ, offset=offset)
        raw = np.frombuffer(mapped, np.uint8, offset=entry.start - offset)
        return np.require(raw.view(entry.dtype), requirements="A").reshape(entry.shape)

    def read_ahead(self, prefix: str) -> bool:
        """Brings the tensors of the module `prefix` from the disk into the system's cache; says whether it could.

        Of a file that is gone by now, whoever reads it will hear.
        """
        entries = [entry for entry in map(self.entry, self.names_in(prefix)) if entry.start < entry.stop]
        try:
            if not all(map(_is_cached, entries)):
                for entry in entries:
                    _into_cache(entry)
        except OSError:
            return False
        return True

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name` of the folder, or None where there is no such file."""
        file = self.path / name
        return read_json(file) if os.path.lexists(file) else None


def _is_cached(entry: Entry) -> bool:
    """Whether a tensor's end is in the system's cache, which would be read last."""
    with entry.file.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], entry.stop - 1, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or the file system cannot tell
            return False


def _into_cache(entry: Entry) -> None:
    """Sends a tensor nowhere, for which the system reads it: to the end, unlike on mere advice, and without a copy."""
    with entry.file.open("rb", buffering=0) as file, open(os.devnull, "wb", buffering=0) as nowhere:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = entry.start
        while start < entry.stop and (sent := os.sendfile(nowhere.fileno(), file.fileno(), start, entry.stop - start)):
            start += sent


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError naming file and position."""
    file_size(file)
    try:
        value = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text at byte {error.start}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def file_size(file: Path) -> int:
    """Bytes of a regular file, or of the one that a symbolic link leads to.

    Raises CheckpointError for a link that leads nowhere or to itself, and for a folder, pipe or device.
    """
    try:
        status = file.stat()
    except OSError as error:
        link = f" (a symbolic link to {os.readlink(file)!r})" if file.is_symlink() else ""
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}{link}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: not a regular file")
    return status.st_size


def _folder_entries(folder: Path, names: list[str]) -> dict[str, Entry]:
    if SINGLE in names:
        return read_header(folder / SINGLE)
    if INDEX in names:
        return _sharded_entries(folder / INDEX)
    # Older tools give their own names: gptq_model-4bit-128g.safetensors.
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(SUFFIX)]
    if len(indices) == 1:
        return _sharded_entries(folder / indices[0])
    if len(singles) == 1 and not indices:
        return read_header(folder / singles[0])
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickle files ({_listing(pickles)}), which run code when loaded and "
            "are never opened; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: no {SINGLE} or {INDEX}; the folder has {_listing(names)}")


def _sharded_entries(index: Path) -> dict[str, Entry]:
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: key 'weight_map' is missing or not an object")
    headers: dict[str, dict[str, Entry]] = {}
    entries = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set("/\\\0") & set(shard):
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is in {shard!r}; allowed are names of files in the folder itself"
            )
        if shard not in headers:
            if not os.path.lexists(folder / shard):
                raise CheckpointError(f"{index}: tensor {tensor!r} is in {shard!r}, which is missing")
            headers[shard] = read_header(folder / shard)
        if tensor not in headers[shard]:
            raise CheckpointError(f"{index}: tensor {tensor!r} should be in {shard!r}, which lacks it")
        entries[tensor] = headers[shard][tensor]
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against its size: names, dtypes, shapes, bytes.

    Raises CheckpointError where the header is not one, or where its tensors overlap, leave a gap,
    do not match their shape, or do not end where the file does.
    """
    size = file_size(file)
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: not a safetensors file: {size} bytes, expected at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise CheckpointError(f"{file}: header length {length} is larger than the file ({size} bytes)")
        raw = stream.read(length)
    header = _parse_header(file, raw)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, row, data_start=8 + length) for name, row in header.items()}
    _check_ranges(file, entries, data_start=8 + length, size=size)
    return entries


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: the header names {twice!r} twice")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    return header


def _entry(file: Path, name: str, row: Any, *, data_start: int) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(row, dict):
        raise CheckpointError(f"{where}: expected an object in the header, got {row!r}")
    dtype = row.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    shape = _naturals(row.get("shape"), f"{where}: shape")
    offsets = _naturals(row.get("data_offsets"), f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {list(offsets)} are not [begin, end]")
    start, stop = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected:
        raise CheckpointError(
            f"{where}: shape {list(shape)} of {dtype} takes {expected} bytes, its data_offsets span {stop - start}"
        )
    return Entry(file, DTYPES[dtype], shape, data_start + start, data_start + stop)


def _naturals(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise CheckpointError(f"{where} {value!r} is not a list of non-negative integers")
    return tuple(value)


def _check_ranges(file: Path, entries: Mapping[str, Entry], *, data_start: int, size: int) -> None:
    """Check that tensors tile the data, as the format demands: no overlap, gap or remainder."""
    total = max((entry.stop for entry in entries.values()), default=data_start)
    if total > size:
        name = next(name for name, entry in entries.items() if entry.stop > size)
        raise CheckpointError(
            f"{file}: tensor {name!r} ends at byte {entries[name].stop}, outside the file; "
            f"the header describes {total} bytes, the file has {size} (truncated?)"
        )
    end, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {name!r} {what} {previous}: it starts at byte {entry.start}, expected {end}"
            )
        end, previous = entry.stop, f"tensor {name!r}"
    if end != size:
        raise CheckpointError(f"{file}: the header describes {end} bytes, the file has {size}")


def _listing(names: list[str], *, most: int = 6) -> str:
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
