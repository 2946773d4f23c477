"""Folders are read whole and checked; a malformed one is an error that names the place."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qjax.checkpoints import CheckpointFiles
from qjax.checkpoints.files import DTYPES, INDEX, SINGLE, read_header
from qjax.errors import CheckpointError

PYLM = Path(__file__).parents[3] / "examples" / "pylm-4m"
ROWS = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def raw(header: Any, data: bytes = bytes(24)) -> bytes:
    """A safetensors file with just this header."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def row(**changes: Any) -> dict[str, Any]:
    return {"a": ROWS["a"] | changes}


class HeaderTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.file = tmp_path / SINGLE

    def reject(self, content: bytes, message: str) -> None:
        self.file.write_bytes(content)
        with self.assertRaisesRegex(CheckpointError, message) as caught:
            read_header(self.file)
        self.assertIn(str(self.file), str(caught.exception))

    @parameterized.named_parameters(
        ("of_nothing", b"", "0 bytes, expected at least 8"),
        ("shorter_than_its_length_field", b"12345", "5 bytes, expected at least 8"),
        (
            "whose_header_is_larger_than_the_file",
            struct.pack("<Q", 1 << 40) + b"{}",
            r"header length 1099511627776 is larger than the file \(10 bytes\)",
        ),
        ("that_is_not_json", raw(b"{nope}"), "not valid JSON"),
        ("that_is_not_utf8", raw(b'{"\xff\xfe\xff": 1}'), "not valid JSON"),
        ("nested_without_end", raw(b"[" * 100_000), "not valid JSON"),
        ("that_is_a_list", raw([]), "not a JSON object"),
        (
            "that_names_a_tensor_twice",
            raw(b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}'),
            "names 'a' twice",
        ),
        ("with_a_row_that_is_a_number", raw({"a": 3}), "tensor 'a': expected an object.*got 3"),
        ("of_an_unknown_dtype", raw(row(dtype="F7")), "'a': unknown dtype 'F7'; known: BOOL, U8"),
        ("of_a_dtype_that_is_a_list", raw(row(dtype=["F32"])), "'a': unknown dtype"),
        ("with_a_negative_shape", raw(row(shape=[-2, 3])), r"'a': shape \[-2, 3\] is not a list"),
        ("with_a_boolean_shape", raw(row(shape=[True, 6])), r"'a': shape \[True, 6\] is not"),
        ("without_offsets", raw(row(data_offsets=None)), "'a': data_offsets None"),
        ("with_three_offsets", raw(row(data_offsets=[0, 1, 24])), "are not .begin, end."),
        ("with_offsets_backwards", raw(row(data_offsets=[24, 0])), r"'a': data_offsets \[24, 0\]"),
        (
            "whose_shape_is_larger_than_its_bytes",
            raw(row(shape=[1 << 40, 3])),
            r"shape \[1099511627776, 3\] of F32 takes \d+ bytes, its data_offsets span 24",
        ),
        (
            "whose_offsets_lie_outside_the_file",
            raw(row(data_offsets=[1 << 30, (1 << 30) + 24])),
            "'a' ends at byte .* outside the file",
        ),
        ("that_is_truncated", raw(ROWS, bytes(20)), r"describes \d+ bytes, the file has \d+ \(trunc"),
        ("with_bytes_left_over", raw(ROWS, bytes(30)), r"describes \d+ bytes, the file has \d+"),
        (
            "whose_tensors_overlap",
            raw(ROWS | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}),
            "tensor 'b' overlaps tensor 'a'",
        ),
        (
            "with_a_gap",
            raw(ROWS | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [26, 30]}}, bytes(30)),
            "tensor 'b' leaves a gap after tensor 'a'",
        ),
    )
    def test_a_file(self, content, message):
        self.reject(content, message)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_at_all_cause_anything_but_a_checkpoint_error(tmp_path_factory, noise, cut):
    file = tmp_path_factory.mktemp("fuzz") / SINGLE
    whole = raw(ROWS)
    file.write_bytes(whole[:cut] + noise)
    try:
        entries = read_header(file)
    except CheckpointError:
        return
    assert all(entry.stop <= file.stat().st_size for entry in entries.values())


class FolderTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "model"
        self.folder.mkdir()

    def write(self, name: str, content: Any) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / name).write_bytes(content)

    def reject(self, message: str) -> None:
        with self.assertRaisesRegex(CheckpointError, message):
            CheckpointFiles.open(self.folder)

    @parameterized.parameters(*DTYPES)
    def test_every_dtype_is_read_as_the_safetensors_library_wrote_it(self, name):
        values = np.arange(1, 7).reshape(2, 3).astype(DTYPES[name])
        save_file({"x": values, "empty": values[:0]}, self.folder / SINGLE)
        self.write("config.json", {})
        files = CheckpointFiles.open(self.folder)
        self.assertEqual(files["x"].dtype, DTYPES[name])
        self.assertEqual((files.shape("x"), files.dtype("x")), ((2, 3), DTYPES[name]))
        self.assertEqual(files["x"].tobytes(), values.tobytes())
        self.assertEqual(files["empty"].shape, (0, 3))

    def test_a_tensor_that_starts_at_an_odd_byte_is_still_read(self):
        header = {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
        }
        self.write(SINGLE, raw(header, b"\x07" + struct.pack("<f", 1.5)))
        self.write("config.json", {})
        self.assertEqual(CheckpointFiles.open(self.folder)["b"][0], 1.5)

    def test_a_tensor_is_a_view_that_cannot_be_written(self):
        save_file({"x": np.zeros(3, ml_dtypes.bfloat16)}, self.folder / SINGLE)
        self.write("config.json", {})
        with self.assertRaises(ValueError):
            CheckpointFiles.open(self.folder)["x"][0] = 1

    def test_shards_are_read_through_their_index(self):
        save_file({"a": np.float32([1])}, self.folder / "one.safetensors")
        save_file({"b": np.float32([2])}, self.folder / "two.safetensors")
        self.write(INDEX, {"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}})
        self.write("config.json", {"model_type": "llama"})
        files = CheckpointFiles.open(self.folder)
        self.assertEqual(files.names(), ["a", "b"])
        self.assertEqual((files["a"][0], files["b"][0]), (1, 2))
        self.assertEqual(files.config, {"model_type": "llama"})

    @parameterized.parameters(
        "../good/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "\0", 3
    )
    def test_an_index_may_not_point_outside_the_folder(self, shard):
        self.write(INDEX, {"weight_map": {"a": shard}})
        self.write("config.json", {})
        self.reject("tensor 'a' is in .*allowed are names of files in the folder itself")

    def test_an_index_may_not_name_a_missing_file_or_tensor(self):
        self.write("config.json", {})
        self.write(INDEX, {"weight_map": {"a": "one.safetensors"}})
        self.reject("tensor 'a' is in 'one.safetensors', which is missing")
        save_file({"b": np.float32([1])}, self.folder / "one.safetensors")
        self.reject("tensor 'a' should be in 'one.safetensors', which lacks it")

    def test_an_index_needs_a_weight_map(self):
        self.write("config.json", {})
        self.write(INDEX, {"weights": {}})
        self.reject("'weight_map' is missing")

    def test_a_pickle_is_refused_and_never_opened(self):
        self.write("config.json", {})
        opened = self.folder / "opened"

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(opened),)

        self.write("pytorch_model.bin", pickle.dumps(Bomb()))
        self.reject("only pickle files .pytorch_model.bin.*convert them to safetensors")
        self.assertFalse(opened.exists())

    def test_a_config_that_is_cut_off_is_named_with_the_position(self):
        save_file({"a": np.float32([1])}, self.folder / SINGLE)
        self.write("config.json", b'{"model_type": "llama",\n "x')
        self.reject(r"config.json: not valid JSON at line 2, column 2")
        self.write("config.json", b"[]")
        self.reject("config.json: expected a JSON object, got list")
        self.write("config.json", b"\xff{}")
        self.reject("config.json: not UTF-8 text at byte 0")

    def test_a_folder_without_a_part_says_which(self):
        self.reject("the folder is empty; expected config.json and model.safetensors")
        self.write("readme.md", b"hello")
        self.reject("no model.safetensors or .*; the folder has readme.md")
        save_file({"a": np.float32([1])}, self.folder / SINGLE)
        self.reject("no config.json; the folder has model.safetensors, readme.md")

    def test_a_path_that_is_no_folder_is_refused(self):
        with self.assertRaisesRegex(CheckpointError, "does not exist; expected a local"):
            CheckpointFiles.open(self.folder / "nowhere")
        self.write("file", b"")
        with self.assertRaisesRegex(CheckpointError, "is a file; expected a local"):
            CheckpointFiles.open(self.folder / "file")

    def test_a_missing_tensor_is_named(self):
        save_file({"a": np.float32([1])}, self.folder / SINGLE)
        self.write("config.json", {})
        files = CheckpointFiles.open(self.folder)
        self.assertNotIn("b", files)
        with self.assertRaisesRegex(CheckpointError, "tensor 'b' is missing; the folder has a"):
            files["b"]

    def test_other_json_of_the_folder_is_read_where_it_exists(self):
        save_file({"a": np.float32([1])}, self.folder / SINGLE)
        self.write("config.json", {})
        self.write("generation_config.json", {"eos_token_id": 7})
        files = CheckpointFiles.open(self.folder)
        self.assertEqual(files.json("generation_config.json"), {"eos_token_id": 7})
        self.assertIsNone(files.json("quantize_config.json"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_or_to_itself_is_named(name: str, target: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PYLM, tmp_path / "copy"))
    (folder / name).unlink()
    (folder / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: .*\(a symbolic link to '"):
        CheckpointFiles.open(folder)


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    for file in PYLM.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert CheckpointFiles.open(tmp_path).names() == CheckpointFiles.open(PYLM).names()


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PYLM, tmp_path / "copy"))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        CheckpointFiles.open(folder)
