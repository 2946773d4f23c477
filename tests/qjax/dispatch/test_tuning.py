"""Tuned tables: buckets, layering, and files that cannot be used."""

import json
import re
from pathlib import Path

import pytest
from absl import logging
from absl.testing import parameterized

from qjax.dispatch import tuning
from qjax.dispatch.tuning import Entry, Table

SCHEME = "w4a16:group_size=128"


def entry(m=1, microseconds=10.0, kernel="triton.int", **config):
    return Entry(kernel, SCHEME, 4096, 4096, m, tuning.freeze(config), microseconds)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty shipped folder and an empty folder of the user."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("QJAX_TUNING_DIR", str(tmp_path / "user"))
    return tmp_path


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: found.append(text % args))
    return found


class BucketTest(parameterized.TestCase):
    @parameterized.parameters((0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (2048, 2048))
    def test_a_bucket_is_the_power_of_two_at_or_above(self, m, expected):
        assert tuning.bucket(m) == expected

    @parameterized.parameters((1, 1), (2, 1), (3, None), (8, 16), (16, 16), (17, 16), (100, None), (600, 2048))
    def test_a_bucket_beside_stands_in_and_one_farther_off_does_not(self, m, expected):
        table = Table([entry(1), entry(16), entry(2048)])
        found = table.nearest("triton.int", SCHEME, 4096, 4096, m)
        assert (found and found.m) == expected

    def test_other_kernels_schemes_and_shapes_are_not_near(self):
        table = Table([entry(1)])
        assert table.nearest("mosaic.int", SCHEME, 4096, 4096, 1) is None
        assert table.nearest("triton.int", "w4a16:group_size=64", 4096, 4096, 1) is None
        assert table.nearest("triton.int", SCHEME, 4096, 4097, 1) is None

    def test_a_device_has_a_file_of_its_own(self):
        names = [tuning.file_name(device) for device in ("RTX 4090", "A100-80GB-PCIe")]
        assert names == ["rtx-4090.json", "a100-80gb-pcie.json"]


def test_what_is_written_is_read_again():
    written = [entry(1, tile_n=64, swizzle=True), entry(16, 20.5, tile_n=128, kind="a")]
    path = tuning.write("H200", written)
    assert path == tuning.user_directory() / "h200.json"
    assert list(tuning.read("H200")) == written
    assert [p.name for p in path.parent.iterdir()] == ["h200.json"]


def test_writing_adds_and_replaces():
    tuning.write("H200", [entry(1, 10.0), entry(16, 20.0)])
    tuning.write("H200", [entry(16, 15.0), entry(64, 30.0)])
    assert {e.m: e.microseconds for e in tuning.read("H200")} == {1: 10.0, 16: 15.0, 64: 30.0}


def test_a_users_table_goes_on_top_of_the_shipped_one(folders):
    tuning.write("H200", [entry(1, 10.0), entry(16, 20.0)], folders / "shipped")
    tuning.write("H200", [entry(16, 15.0)])
    assert {e.m: e.microseconds for e in tuning.read("H200")} == {1: 10.0, 16: 15.0}


def test_the_same_table_is_given_until_a_file_changes():
    tuning.write("H200", [entry(1)])
    first = tuning.read("H200")
    assert tuning.read("H200") is first
    tuning.write("H200", [entry(2)])
    assert tuning.read("H200") is not first
    assert len(list(tuning.read("H200"))) == 2


def test_a_device_without_files_has_an_empty_table():
    assert list(tuning.read("T4")) == []


def test_without_a_setting_the_users_tables_are_in_their_cache(monkeypatch):
    monkeypatch.delenv("QJAX_TUNING_DIR")
    assert tuning.user_directory() == Path.home() / ".cache/qjax/tuning"


GOOD = {
    "kernel": "triton.int", "scheme": SCHEME, "n": 8, "k": 128, "m": 1,
    "config": {"tile_n": 64}, "microseconds": 3,
}  # fmt: skip


def document(**changes):
    return {"version": tuning.VERSION, "device": "H200", "entries": [GOOD]} | changes


def entry_with(**changes):
    return document(entries=[GOOD | changes])


UNUSABLE = {
    "truncated": (b'{"version": 1, "entr', "Expecting|Unterminated"),
    "binary": (b"\xff\xfe\x00", "codec"),
    "another shape": ([1, 2], "list of entries"),
    "entries of another shape": (document(entries=[1]), "an entry has the fields"),
    "an older version": (document(version=0), "version is 0, this is 1"),
    "another device": (document(device="A100"), "for 'A100', this is 'H200'"),
    "a field missing": (document(entries=[{"kernel": "x"}]), "an entry has the fields"),
    "a size of the wrong type": (entry_with(n="8"), "entry's n cannot"),
    "a negative time": (entry_with(microseconds=-1), "entry's microseconds cannot"),
    "a time that is no number": (entry_with(microseconds=float("nan")), "microseconds cannot"),
    "a nested config": (entry_with(config={"a": [1]}), "entry's config cannot"),
}


@pytest.mark.parametrize("content, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_is_reported_once_and_ignored(content, reason, warnings):
    path = tuning.user_directory() / "h200.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert list(tuning.read("H200")) == []
    assert list(tuning.read("H200")) == []
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert re.search(reason, warnings[0])


def test_the_good_file_those_were_made_from_is_used():
    path = tuning.user_directory() / "h200.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document()))
    assert [(e.n, e.config) for e in tuning.read("H200")] == [(8, (("tile_n", 64),))]
