"""Tuned tables: which config of a kernel was the fastest, and how long it took.

One JSON file a GPU, `<device>.json`; entries are keyed by (kernel, scheme, N, K, M bucket). The
shipped ones lie in `qjax/tuning/`; a user's own directory, `$QJAX_TUNING_DIR` or
`~/.cache/qjax/tuning`, goes on top. Nothing is measured here. A file that cannot be used is
reported once and ignored.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

VERSION = 1
SHIPPED = Path(__file__).parents[1] / "tuning"

Config = tuple[tuple[str, int | float | str | bool], ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest config of one kernel at one size, and its microseconds. `m` is a bucket."""

    kernel: str
    scheme: str
    n: int
    k: int
    m: int
    config: Config
    microseconds: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What an entry is looked up by, but for m."""
        return self.kernel, self.scheme, self.n, self.k


class Table:
    """The entries for one device. Compared by identity: `read` returns one until a file changes."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[tuple[str, str, int, int], dict[int, Entry]] = {}
        for entry in entries:
            self._entries.setdefault(entry.key, {})[entry.m] = entry

    def __iter__(self) -> Iterator[Entry]:
        return (entry for buckets in self._entries.values() for entry in buckets.values())

    def nearest(self, kernel: str, scheme: str, n: int, k: int, m: int) -> Entry | None:
        """The entry whose M bucket is m's or the next one, the larger of two; None where there is none.

        Its config is the best known for m; its time is m's only where `entry.m == bucket(m)`. What is best for far
        fewer or far more rows is no guide: a tile for one row is slow with many.
        """
        buckets, at = self._entries.get((kernel, scheme, n, k), {}), bucket(m)
        return next((buckets[near] for near in (at, 2 * at, at // 2) if near in buckets), None)


def bucket(m: int) -> int:
    """The power of two at or above m, 1 at least."""
    return 1 << max(m - 1, 0).bit_length()


def user_directory() -> Path:
    """Where a user's own tables are: `$QJAX_TUNING_DIR`, else `~/.cache/qjax/tuning`."""
    given = os.environ.get("QJAX_TUNING_DIR")
    return Path(given) if given else Path.home() / ".cache" / "qjax" / "tuning"


def file_name(device: str) -> str:
    """`RTX 4090` -> `rtx-4090.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(device: str) -> Table:
    """The table for the device of that name: the shipped one with the user's on top."""
    paths = (directory / file_name(device) for directory in (SHIPPED, user_directory()))
    return _merged(device, tuple((p, p.stat().st_mtime_ns) for p in paths if p.is_file()))


@functools.lru_cache(maxsize=64)
def _merged(device: str, files: tuple[tuple[Path, int], ...]) -> Table:
    return Table(entry for path, stamp in files for entry in _load(path, stamp, device))


@functools.lru_cache(maxsize=64)
def _load(path: Path, stamp: int, device: str) -> tuple[Entry, ...]:
    """The entries of a file as it was at `stamp`."""
    return _parse_file(path, device)


def _parse_file(path: Path, device: str) -> tuple[Entry, ...]:
    """The entries of one file; none, with a warning, where it is not a table for this device."""
    try:
        return load(path, device)
    except (OSError, ValueError) as error:
        logging.warning("tuning table %s is ignored: %s", path, error)
        return ()


def load(path: Path, device: str) -> tuple[Entry, ...]:
    """The entries of one file.

    Raises:
      ValueError: it is not a table for this device, of this version.
    """
    return _parse(json.loads(path.read_text(encoding="utf-8")), device)  # JSON and UTF-8 errors are ValueErrors


def _parse(document: Any, device: str) -> tuple[Entry, ...]:
    """Entries of a parsed file. Raises ValueError saying what is wrong with it."""
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise ValueError("it is not an object with a list of entries")
    if document.get("version") != VERSION:
        raise ValueError(f"its version is {document.get('version')!r}, this is {VERSION}")
    if document.get("device") != device:
        raise ValueError(f"it is for {document.get('device')!r}, this is {device!r}")
    return tuple(_parse_entry(fields) for fields in document["entries"])


_TYPES: dict[str, type | tuple[type, ...]] = {
    "kernel": str, "scheme": str, "n": int, "k": int, "m": int,
    "config": dict, "microseconds": (int, float),
}  # fmt: skip


def _usable(name: str, value: Any) -> bool:
    if not isinstance(value, _TYPES[name]):
        return False
    if isinstance(value, dict):
        return all(isinstance(v, int | float | str) for v in value.values())
    return value > 0 if isinstance(value, int | float) else True


def _parse_entry(fields: Any) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != _TYPES.keys():
        raise ValueError(f"an entry has the fields {', '.join(_TYPES)}; got {fields!r}")
    wrong = [name for name, value in fields.items() if not _usable(name, value)]
    if wrong:
        raise ValueError(f"an entry's {', '.join(wrong)} cannot be used: {fields!r}")
    return Entry(**{**fields, "config": freeze(fields["config"]), "m": bucket(fields["m"])})


def freeze(config: Mapping[str, int | float | str | bool]) -> Config:
    """A config as a hashable value; `dict` gives it back."""
    return tuple(sorted(config.items()))


def write(device: str, entries: Iterable[Entry], directory: Path | None = None) -> Path:
    """Adds entries to the device's file in `directory`, the user's by default; returns its path.

    An entry replaces one of the same key and m; a file that cannot be used is replaced with a
    warning. It is written aside and renamed, so that a reader sees the old one or the new one.
    """
    path = (directory or user_directory()) / file_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = _parse_file(path, device) if path.is_file() else ()
    table = sorted(Table([*old, *entries]), key=lambda e: (*e.key, e.m))
    document = {
        "version": VERSION,
        "device": device,
        "entries": [{**dataclasses.asdict(e), "config": dict(e.config)} for e in table],
    }
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(document, indent=1), encoding="utf-8")
    aside.replace(path)
    for cached in (_load, _merged):  # two writes may share a time stamp
        cached.cache_clear()
    return path
