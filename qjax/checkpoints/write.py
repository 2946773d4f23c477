"""Writes a checkpoint folder whole or not at all: beside its place first, then renamed into it.

Enters named arrays, a config and other small files; leaves a folder that `CheckpointFiles.open`
reads. Tensors go to disk one at a time, in shards of bounded size.
"""

import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from qjax.checkpoints.files import CONFIG, DTYPES, INDEX, SINGLE
from qjax.errors import CheckpointError

SHARD_BYTES = 5 * 10**9  # what Hugging Face's hub splits at

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

type Array = jax.Array | np.ndarray


def write_folder(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors`, `config` (config.json) and `extra_files` (name -> content) as a folder.

    Everything is written into a hidden folder beside `path` and renamed when complete: a write that
    fails leaves `path` as it was. An older checkpoint is replaced only with `overwrite`, and any
    other folder never.

    Raises:
      CheckpointError: `path` exists; it is not a checkpoint and would be lost, or it cannot be
        written; a tensor has a dtype that safetensors has no name for; an extra file would leave
        the folder or take the name of another.
    """
    target = Path(path).absolute()
    extra_files = extra_files or {}
    check_target(target, overwrite=overwrite)
    _check_names(target, extra_files)
    shards = _split(target, tensors, shard_bytes)
    with _renamed_into(target) as folder:
        for name, content in extra_files.items():
            with _synced(folder / name) as stream:
                stream.write(content)
        for file, names in shards.items():
            with _synced(folder / file) as stream:
                _write_tensors(stream, names, tensors)
        if SINGLE not in shards:
            _write_json(folder / INDEX, _index(shards, tensors))
        _write_json(folder / CONFIG, config)


def check_target(
    path: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, overwrite: bool
) -> None:
    """Looks at the place for a folder; `write_folder` does, and long work that ends in one should before it begins.

    Args:
      path: the folder to be written.
      source: a folder that is read for it and must remain.
      overwrite: whether an older checkpoint may be replaced.

    Raises:
      CheckpointError: `path` is, or holds, `source`; it exists; it is not a checkpoint and would be lost; or it cannot
        be written.
    """
    target = Path(path).absolute()
    if source is not None and target.exists() and Path(source).resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target}: would replace {source}, which is read for it; choose another folder")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{target}: {above} is no folder that can be written to")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: exists and is not a folder")
    names = os.listdir(target)
    if names and not overwrite:
        raise CheckpointError(f"{target}: exists; choose another folder or allow to overwrite it (--overwrite)")
    if names and CONFIG not in names:
        raise CheckpointError(f"{target}: not overwritten: it has no {CONFIG}, so it is not a checkpoint")


def _check_names(target: Path, extra_files: Mapping[str, bytes]) -> None:
    for name in extra_files:
        taken = name in (CONFIG, INDEX) or name.endswith(".safetensors")
        if taken or not name or name != Path(name).name:
            raise CheckpointError(
                f"{target}: extra file {name!r}: expected a plain file name other than {CONFIG}, "
                f"{INDEX} and *.safetensors"
            )


def _split(target: Path, tensors: Mapping[str, Array], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors in it, in order. A tensor above `shard_bytes` has a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in _NAMES:
            raise CheckpointError(
                f"{target}: tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot "
                f"hold; it holds {', '.join(str(dtype) for dtype in _NAMES)}"
            )
        if filled and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _index(shards: Mapping[str, list[str]], tensors: Mapping[str, Array]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def _write_tensors(stream: BinaryIO, names: list[str], tensors: Mapping[str, Array]) -> None:
    """One safetensors file: header length (u64), JSON header padded with spaces, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(struct.pack("<Q", len(raw)))
    stream.write(raw)
    for name in names:
        host = np.ascontiguousarray(np.asarray(tensors[name]))
        stream.write(host.reshape(-1).view(np.uint8).data)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with _synced(file) as stream:
        stream.write(json.dumps(value, indent=2).encode() + b"\n")


@contextmanager
def _synced(file: Path) -> Iterator[BinaryIO]:
    with file.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())  # the rename must not reach the disk before the content does


@contextmanager
def _renamed_into(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex[:8]
    aside = target.with_name(f".{target.name}.{tag}.partial")
    aside.mkdir()
    try:
        yield aside
        _swap(aside, target, retired=target.with_name(f".{target.name}.{tag}.old"))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(aside: Path, target: Path, *, retired: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    target.rename(retired)
    try:
        aside.rename(target)
    except OSError:
        retired.rename(target)
        raise
    shutil.rmtree(retired)
