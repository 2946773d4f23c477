"""Where checkpoints that other tools wrote are found: in the folder that QJAX_CHECKPOINTS names."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

VARIABLE = "QJAX_CHECKPOINTS"


@pytest.fixture(scope="session")
def real_folder() -> Callable[[str], Path]:
    """Gives the path of one by its name; a test that asks for one is skipped where it is absent."""

    def find(name: str) -> Path:
        root = os.environ.get(VARIABLE)
        if root is None:
            pytest.skip(f"set {VARIABLE} to a folder of checkpoints; see docs/checkpoints.md")
        if not (folder := Path(root) / name).is_dir():
            pytest.skip(f"{folder} is absent")
        return folder

    return find
