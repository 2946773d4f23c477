"""Folders are written whole or not at all, and read back to the bit."""

import json
import os
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from absl.testing import parameterized

from qjax.checkpoints import CheckpointFiles, write_folder
from qjax.checkpoints.files import DTYPES
from qjax.checkpoints.write import check_target
from qjax.errors import CheckpointError

OLD, NEW = {"x": np.float32([1, 2])}, {"x": np.float32([3, 4, 5])}


class WriteTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.parent = tmp_path
        self.folder = tmp_path / "model"

    def listing(self) -> list[str]:
        return sorted(path.name for path in self.parent.iterdir())

    def test_every_dtype_is_read_back_to_the_bit_here_and_by_the_safetensors_library(self):
        tensors = {name: np.arange(6).reshape(2, 3).astype(d) for name, d in DTYPES.items()}
        tensors["transposed"] = tensors["BF16"].T
        tensors["scalar"], tensors["empty"] = np.float32(3), np.zeros((0, 4), np.int8)
        write_folder(self.folder, tensors=tensors, config={"model_type": "x"})
        files = CheckpointFiles.open(self.folder)
        theirs = dict(safetensors.deserialize((self.folder / "model.safetensors").read_bytes()))
        self.assertEqual(theirs.keys(), tensors.keys())
        for name, tensor in tensors.items():
            self.assertEqual(files[name].shape, tensor.shape)
            self.assertEqual(files[name].tobytes(), tensor.tobytes(), name)
            self.assertEqual(tuple(theirs[name]["shape"]), tensor.shape)
            self.assertEqual(bytes(theirs[name]["data"]), tensor.tobytes(), name)
        self.assertEqual(files.config, {"model_type": "x"})

    def test_device_arrays_are_written(self):
        write_folder(self.folder, tensors={"x": jnp.ones((2,), jnp.bfloat16)}, config={})
        np.testing.assert_array_equal(CheckpointFiles.open(self.folder)["x"], [1, 1])

    def test_large_tensors_go_to_shards_with_an_index(self):
        tensors = {f"t{i}": np.full(10, i, np.float32) for i in range(5)}
        write_folder(self.folder, tensors=tensors, config={}, shard_bytes=80)
        shards = sorted(self.folder.glob("*.safetensors"))
        self.assertEqual([f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)], [s.name for s in shards])
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        self.assertEqual(index["metadata"], {"total_size": 200})
        files = CheckpointFiles.open(self.folder)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(files[name], tensor)

    def test_a_tensor_larger_than_a_shard_has_one_of_its_own(self):
        tensors = {"a": np.zeros(100, np.uint8), "b": np.zeros(1, np.uint8)}
        write_folder(self.folder, tensors=tensors, config={}, shard_bytes=10)
        self.assertLen(list(self.folder.glob("*.safetensors")), 2)

    def test_extra_files_are_written_beside(self):
        extra = {"tokenizer.json": b"{}"}
        write_folder(self.folder, tensors=OLD, config={}, extra_files=extra)
        self.assertEqual((self.folder / "tokenizer.json").read_bytes(), b"{}")

    @parameterized.parameters("config.json", "../x", "a/b", "", "other.safetensors")
    def test_an_extra_file_may_not_leave_the_folder_or_hide_another(self, name):
        with self.assertRaisesRegex(CheckpointError, "expected a plain file name"):
            write_folder(self.folder, tensors=OLD, config={}, extra_files={name: b""})
        self.assertEqual(self.listing(), [])

    def test_an_existing_folder_is_refused(self):
        write_folder(self.folder, tensors=OLD, config={})
        with self.assertRaisesRegex(CheckpointError, "model: exists; choose another folder"):
            write_folder(self.folder, tensors=NEW, config={})
        np.testing.assert_array_equal(CheckpointFiles.open(self.folder)["x"], OLD["x"])

    def test_a_checkpoint_is_replaced_when_overwriting_is_allowed(self):
        write_folder(self.folder, tensors=OLD, config={}, extra_files={"stale": b""})
        write_folder(self.folder, tensors=NEW, config={}, overwrite=True)
        np.testing.assert_array_equal(CheckpointFiles.open(self.folder)["x"], NEW["x"])
        self.assertFalse((self.folder / "stale").exists())
        self.assertEqual(self.listing(), ["model"])

    def test_a_folder_that_is_no_checkpoint_is_never_replaced(self):
        self.folder.mkdir()
        (self.folder / "thesis.tex").write_text("years of work")
        with self.assertRaisesRegex(CheckpointError, "not a checkpoint"):
            write_folder(self.folder, tensors=NEW, config={}, overwrite=True)
        self.assertTrue((self.folder / "thesis.tex").exists())

    def test_a_file_in_the_way_is_never_replaced(self):
        self.folder.write_text("a file")
        with self.assertRaisesRegex(CheckpointError, "exists and is not a folder"):
            write_folder(self.folder, tensors=NEW, config={}, overwrite=True)

    @parameterized.parameters("model", "model/inner", "link")
    def test_a_folder_that_is_read_or_holds_one_that_is_read_is_not_to_be_replaced(self, source):
        write_folder(self.folder, tensors=OLD, config={})
        (self.folder / "inner").mkdir()
        (self.parent / "link").symlink_to(self.folder)
        with self.assertRaisesRegex(CheckpointError, f"/model: would replace .*{source}, which is read for it"):
            check_target(self.folder, source=self.parent / source, overwrite=True)
        check_target(self.folder, source=self.parent / "model-2", overwrite=True)

    def test_a_folder_may_be_overwritten_with_its_own_mapped_tensors(self):
        write_folder(self.folder, tensors=OLD, config={})
        files = CheckpointFiles.open(self.folder)
        write_folder(self.folder, tensors={"y": files["x"]}, config={}, overwrite=True)
        np.testing.assert_array_equal(CheckpointFiles.open(self.folder)["y"], OLD["x"])

    @parameterized.parameters("fsync", "rename")
    def test_a_write_that_dies_midway_leaves_the_old_folder_and_nothing_else(self, where):
        write_folder(self.folder, tensors=OLD, config={})
        calls = {"fsync": (os, "fsync", 2), "rename": (Path, "rename", 2)}
        owner, name, last = calls[where]
        real, count = getattr(owner, name), 0

        def fails(*args):
            nonlocal count
            count += 1
            if count == last:
                raise OSError("disk full")
            return real(*args)

        with mock.patch.object(owner, name, fails), self.assertRaisesRegex(OSError, "disk full"):
            write_folder(self.folder, tensors=NEW, config={}, overwrite=True)
        np.testing.assert_array_equal(CheckpointFiles.open(self.folder)["x"], OLD["x"])
        self.assertEqual(self.listing(), ["model"])

    def test_a_dtype_without_a_name_in_the_format_is_refused(self):
        with self.assertRaisesRegex(CheckpointError, "'x' has dtype int4, which safetensors cannot"):
            write_folder(self.folder, tensors={"x": np.zeros(2, ml_dtypes.int4)}, config={})
