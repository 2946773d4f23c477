"""The real model's tokenizer, and folders without a usable one."""

import pytest

from qjax.errors import CheckpointError
from qjax.models import load_tokenizer


def test_text_survives_a_round_trip(pylm_folder):
    tokenizer = load_tokenizer(pylm_folder)
    text = "def f(x):\n    return x + 'é'\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 4096


def test_special_tokens_are_added_and_skipped_on_request(pylm_folder, reference):
    tokenizer = load_tokenizer(pylm_folder)
    prompt = 'class Error(Exception):\n    """Base class'
    ids = tokenizer.encode(prompt)
    assert ids == reference["prompt2_ids"].tolist()
    assert ids[1:] == tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>" + prompt


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_a_file_that_is_no_tokenizer_says_so(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
