"""A file of measurements: the machine, the revision, and a record for each operation, scheme, backend and size.

Written after every few records, aside and renamed, so that an interruption loses nothing, and read again to go on
where it stopped. Records may have fields that are not known here, and `backend`s of others.
"""

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qjax.errors import QJaxError

Record = dict[str, Any]
Key = tuple[Any, ...]

# What a record is found by, for each `op`.
KEYS = {
    "gemm": ("op", "scheme", "backend", "m", "n", "k"),
    "decode": ("op", "model", "scheme", "backend", "cache", "batch", "prompt", "gpus"),
}
SAME = ("device", "jax", "jaxlib")  # what measurements of one file have in common, besides the revision


def key_of(record: Record) -> Key:
    """What a record is found by."""
    return tuple(record[name] for name in KEYS[record["op"]])


class Results:
    """The records of one run, in a file or (path None) in memory alone.

    Args:
      path: read if it exists.
      machine: as `qjax.bench.machine.describe_machine` has it.
      commit: the revision of the code.

    Raises:
      QJaxError: the file is no such document, or one of another machine, version or revision.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any], commit: str | None) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.header: dict[str, Any] = {"machine": machine, "commit": commit, "date": now}
        self._path = path
        self._records: dict[Key, Record] = {}
        self._failures: dict[Key, Record] = {}
        if path is not None and path.exists():
            self._resume(path, read(path))

    def _resume(self, path: Path, document: dict[str, Any]) -> None:
        mine, theirs = ({**d["machine"], "commit": d["commit"]} for d in (self.header, document))
        for name in (*SAME, "commit"):
            if mine.get(name) != theirs.get(name):
                raise QJaxError(
                    f"{path}: was measured with {name} {theirs.get(name)}, this is {mine.get(name)}: give another file"
                )
        self.header = {name: document[name] for name in self.header}
        self._records = {key_of(record): record for record in document["records"]}
        self._failures = {key_of(record): record for record in document.get("failures", ())}

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    @property
    def machine(self) -> dict[str, Any]:
        """Of the file, where it was there before."""
        return self.header["machine"]

    @property
    def failures(self) -> list[Record]:
        """What could not be measured: the fields of a key, and `error`."""
        return list(self._failures.values())

    def add(self, records: Iterable[Record]) -> None:
        """Adds or replaces records, and writes the file."""
        for record in records:
            self._records[key_of(record)] = {
                name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in record.items()
            }
            self._failures.pop(key_of(record), None)
        self._write()

    def fail(self, key: Key, error: str) -> None:
        """Notes that a record is missing, and why; it will be tried again by the next run."""
        self._failures[key] = {**dict(zip(KEYS[key[0]], key, strict=True)), "error": error}

    def _write(self) -> None:
        if self._path is not None:
            _write(self._path, {**self.header, "failures": self.failures, "records": list(self)})


def read(path: Path) -> dict[str, Any]:
    """The document in a file.

    Raises:
      QJaxError: it is not one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QJaxError(f"{path}: is no JSON: {error}") from error
    known = isinstance(document, dict) and {"machine", "commit", "date", "records"} <= document.keys()
    if not known or not all(isinstance(r, dict) and _has_key(r) for r in document["records"]):
        fields = "; ".join(", ".join(names) for names in KEYS.values())
        raise QJaxError(f"{path}: has no machine, commit, date and records with {fields}")
    return document


def _has_key(record: Record) -> bool:
    return record.get("op") in KEYS and record.keys() >= set(KEYS[record["op"]])


def read_gemm(folder: Path) -> list[dict[str, Any]]:
    """The documents of a folder that hold records of `gemm`, by file name; other files are passed over."""
    return _read_all(folder, "gemm")


def read_decode(folder: Path) -> list[dict[str, Any]]:
    """Those that hold records of `decode`."""
    return _read_all(folder, "decode")


def _read_all(folder: Path, op: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and any(r.get("op") == op for r in document.get("records", ())):
            found.append(read(path))
    return found


def _write(path: Path, document: dict[str, Any]) -> None:
    """One line a record: what changed is seen in a diff."""

    def text(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"

    lines = [f" {json.dumps(name)}: {text(value)}" for name, value in document.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    aside.replace(path)
