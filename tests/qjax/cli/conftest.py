"""What several commands are tried on."""

from pathlib import Path

import pytest
from command import PYLM

from qjax.cli.main import main


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows and a bit."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((PYLM / "eval.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "model"
    assert main(["quantize", str(PYLM), str(folder), "--scheme", "w4a16"]) == 0
    return folder
