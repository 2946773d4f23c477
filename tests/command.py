"""The command in this process: what it prints, and how it fails."""

from pathlib import Path
from typing import Any

import pytest

from qjax.cli.main import main

PYLM = Path(__file__).parents[1] / "examples" / "pylm-4m"


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """What a command prints; it must succeed and keep stderr empty."""
    assert main([str(arg) for arg in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def fail(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line on stderr of a command that must fail."""
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status not in (0, None)
    assert err.count("\n") == 1 and err.startswith("qjax") and ": error: " in err
    assert "Traceback" not in err
    return err
