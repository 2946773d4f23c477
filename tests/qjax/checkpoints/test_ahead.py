"""What is done before it is asked for comes in order, stays bounded, and stops where somebody stops."""

import json
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qjax.checkpoints.ahead import ReadAhead, in_order
from qjax.checkpoints.files import CheckpointFiles, Entry
from qjax.errors import CheckpointError

SIZE, MODULES = 100, [f"m{i}" for i in range(6)]


def test_results_come_in_order_and_few_are_begun_before_they_are_taken() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.002 * (item % 2))
        return item * item

    found = in_order(work, range(10), threads=2)
    for item in range(10):
        assert next(found) == item * item
        assert len(begun) <= item + 3
    assert sorted(begun) == list(range(10))


def test_an_error_is_raised_where_the_result_would_come_and_nothing_is_begun_after_it() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise CheckpointError("three")
        return item

    found = in_order(work, range(100), threads=2)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CheckpointError, match="three"):
        next(found)
    assert max(begun) <= 5


@pytest.fixture
def files(tmp_path: Path) -> CheckpointFiles:
    """Six modules of two tensors, 100 bytes each module."""
    half = SIZE // 2
    header = {
        f"{module}.{name}": {"dtype": "U8", "shape": [half], "data_offsets": [half * at, half * (at + 1)]}
        for at, (module, name) in enumerate((module, name) for module in MODULES for name in "ab")
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(SIZE * len(MODULES))
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    return CheckpointFiles.open(tmp_path)


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within five seconds."""
    until = time.monotonic() + 5
    while not holds() and time.monotonic() < until:
        time.sleep(0.001)
    return holds()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in its cache")
def test_the_disk_is_a_window_ahead_of_what_was_taken(files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("qjax.checkpoints.files._is_cached", lambda entry: False)
    monkeypatch.setattr("qjax.checkpoints.files._into_cache", lambda entry: asked.append(entry.start))
    starts = [files.entry(f"{module}.{name}").start for module in MODULES for name in "ab"]
    with ReadAhead(files, window=2 * SIZE) as ahead:
        ahead.want(MODULES[:1])
        assert soon(lambda: asked == starts[:2])
        ahead.want(MODULES[1:])
        for taken, module in enumerate(MODULES):
            assert soon(lambda taken=taken: asked == starts[: 2 * (taken + 2)])
            time.sleep(0.01)
            assert asked == starts[: 2 * (taken + 2)]
            ahead.taken(module)
    assert not [thread for thread in threading.enumerate() if thread.name == "qjax-read-ahead"]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in its cache")
def test_what_was_taken_already_is_not_asked_for(files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("qjax.checkpoints.files._is_cached", lambda entry: False)
    monkeypatch.setattr("qjax.checkpoints.files._into_cache", lambda entry: asked.append(entry.start))
    with ReadAhead(files) as ahead:
        for module in MODULES[:4]:
            ahead.taken(module)
        ahead.want(MODULES)
        assert soon(lambda: len(asked) == 4)
    assert asked == [files.entry(f"{module}.{name}").start for module in MODULES[4:] for name in "ab"]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in its cache")
@pytest.mark.parametrize("missing", [None, "m2.a", "m2.b"])
def test_a_module_is_read_to_its_end_where_one_of_its_tensors_is_not_in_the_cache(
    missing: str | None, files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_cached(entry: Entry) -> bool:
        return missing is None or entry != files.entry(missing)

    monkeypatch.setattr("qjax.checkpoints.files._is_cached", is_cached)
    send, sent = os.sendfile, []

    def a_part(out: int, file: int, start: int, count: int) -> int:
        done = send(out, file, start, min(count, 30))
        sent.append((start, done))
        return done

    monkeypatch.setattr(os, "sendfile", a_part)
    assert files.read_ahead("m2")
    start = files.entry("m2.a").start
    assert sent == ([] if missing is None else [(start, 30), (start + 30, 20), (start + 50, 30), (start + 80, 20)])


def test_a_file_that_is_gone_stops_the_thread_and_nobody_else(files: CheckpointFiles) -> None:
    (files.path / "model.safetensors").unlink()
    with ReadAhead(files) as ahead:
        ahead.want(MODULES)
        ahead.taken(MODULES[0])
    with pytest.raises(FileNotFoundError):
        files["m0.a"]
