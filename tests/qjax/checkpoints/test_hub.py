"""A name of the hub is downloaded without pickles and code; a folder that exists is never looked up."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import qjax
from qjax.checkpoints.hub import local_folder
from qjax.errors import CheckpointError

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names that the hub was asked for; it has one, org/model."""
    names: list[tuple[str, Any]] = []

    def download(name: str, *, allow_patterns: Any) -> str:
        names.append((name, allow_patterns))
        if name != "org/model":
            raise LocalEntryNotFoundError("no network\nand more")
        return str(PYLM)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return names


def test_a_name_of_the_hub_is_a_model_and_a_tokenizer(asked: list[tuple[str, Any]]) -> None:
    assert len(qjax.load("org/model").layers) == len(qjax.load(PYLM).layers)
    assert qjax.load_tokenizer("org/model").encode("def f") == qjax.load_tokenizer(PYLM).encode("def f")
    assert [name for name, _ in asked] == ["org/model"] * 2
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked[0][1])


def test_a_name_that_the_hub_lacks_is_an_error_in_one_line(asked: list[tuple[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"^org/none: does not exist, and the hub .* out of reach: no network$"):
        qjax.load("org/none")


@pytest.mark.parametrize("path", ["here", "a/b/c", "/a/b", "../b", "a/model.gguf", ""])
def test_what_is_no_name_of_the_hub_is_not_looked_up(path: str, asked: list[tuple[str, Any]]) -> None:
    assert local_folder(path) == Path(path)
    assert not asked


def test_a_folder_that_exists_is_taken(
    tmp_path: Path, asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/model") == Path("org/model")
    assert not asked
