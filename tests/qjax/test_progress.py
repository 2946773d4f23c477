"""The progress bar: only for long work, only on a terminal, and never in the way of the work."""

import io
import sys

import pytest

from qjax import progress


class Terminal(io.StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True


def watch(monkeypatch: pytest.MonkeyPatch, patience: float = 0.0) -> Terminal:
    """Puts a terminal in the place of stderr. Not a fixture: between setup and call pytest changes stderr."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    return stream


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, patience=60)
    assert list(progress.track([1, 2, 3], "quantizing")) == [1, 2, 3]
    assert not terminal.getvalue()


def test_long_work_shows_a_bar_and_yields_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    assert list(progress.track(range(5), "quantizing")) == [0, 1, 2, 3, 4]
    assert "quantizing" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_a_bar_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch, patience=60)
    assert list(progress.track([1], "quantizing", show=True)) == [1]
    assert "quantizing" in terminal.getvalue()


def test_a_bar_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    assert list(progress.track([1], "quantizing", show=False)) == [1]
    assert not terminal.getvalue()


def test_a_file_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert list(progress.track([1, 2], "quantizing")) == [1, 2]
    assert not capsys.readouterr().err
