"""The command that writes text: what the reference wrote, stop texts, samples, characters as they become whole."""

from pathlib import Path

import numpy as np
import pytest
from command import PYLM, run

from qjax.cli.generate import TextStream
from qjax.models import Tokenizer, load_tokenizer


def test_generate_streams_what_the_reference_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    reference = np.load(PYLM / "reference_logits.npz")
    tokenizer = load_tokenizer(PYLM)
    prompt = tokenizer.decode(reference["prompt2_ids"].tolist())
    out = run(capsys, "generate", PYLM, "--prompt", prompt, "--max-new-tokens", 64)
    assert out == tokenizer.decode(reference["continuation2_ids"].tolist()) + "\n"


def test_generate_from_a_quantized_folder_ends_before_a_stop_text(
    int4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("generate", int4, "--prompt", "def f(self):\n    return", "--max-new-tokens", 24)
    assert run(capsys, *argv, "--cache", "int8", "--prompt-activations", "8bit")
    whole = run(capsys, *argv).removesuffix("\n")
    stop = whole[9:14]
    assert run(capsys, *argv, "--stop", stop, "--stop", "never") == whole[: whole.index(stop)] + "\n"


def test_sampling_depends_on_the_seed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("generate", PYLM, "--prompt", "import", "--max-new-tokens", 16, "--temperature", 1.0, "--top-k", 50)
    first = run(capsys, *argv, "--top-p", 0.9, "--seed", 1)
    assert run(capsys, *argv, "--top-p", 0.9, "--seed", 1) == first
    assert run(capsys, *argv, "--top-p", 0.9, "--seed", 2) != first


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(PYLM)


def test_a_character_of_several_tokens_is_written_once_it_is_whole(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tokenizer.encode("x = '☃'", add_special_tokens=False)
    assert len(tokenizer.encode("☃", add_special_tokens=False)) > 1
    stream = TextStream(tokenizer, ids[:1], [])
    written = []
    for token in ids[1:]:
        stream.add(token)
        written.append(capsys.readouterr().out)
    assert "".join(written) == " = '☃'" and len(written) > 3
    assert all("\ufffd" not in piece for piece in written)


def test_what_may_become_a_stop_text_is_held_back_and_given_out_at_the_end(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = TextStream(tokenizer, [], ["abc###"])
    for token in tokenizer.encode("1 abc", add_special_tokens=False):
        stream.add(token)
    assert capsys.readouterr().out == "1 "
    stream.finish()
    assert capsys.readouterr().out == "abc"
