"""What a command line names, and the order of the work."""

import re

import pytest

from qjax.bench import cases
from qjax.errors import BackendError, QJaxError
from qjax.schemes import NF4, W4A16, W8A16


def test_schemes_are_cut_where_a_name_begins_and_not_between_options() -> None:
    found = cases.parse_schemes("w4a16:group_size=64,symmetric=false, nf4,w8a16")
    assert found == [W4A16(group_size=64, symmetric=False), NF4(), W8A16()]


def test_a_shape_is_outputs_by_inputs() -> None:
    assert cases.parse_shapes("22016x4096,1x3") == [(22016, 4096), (1, 3)]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (cases.parse_shapes, "4096", "shape '4096' is not NxK, such as 22016x4096"),
        (cases.parse_shapes, "0x128", "shape '0x128' is not NxK"),
        (cases.parse_rows, "1,two", "number of rows 'two' is not a positive integer"),
        (cases.parse_rows, "", "'' is an empty list"),
        (cases.parse_schemes, "w9a16", "unknown scheme 'w9a16'"),
    ],
)
def test_what_is_no_size_is_named(parse, text: str, message: str) -> None:
    with pytest.raises(QJaxError, match=re.escape(message)):
        parse(text)


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="unknown backend 'quick'; known: auto, xla, triton"):
        cases.parse_backends("auto,quick")


def test_cases_of_one_shape_and_of_one_number_of_rows_are_together() -> None:
    found = cases.cases_of([W4A16(), NF4()], ["auto", "xla"], [1, 16], [(64, 128), (128, 128)])
    assert len({case.key for case in found}) == 16
    assert [(case.n, case.m) for case in found[::4]] == [(64, 1), (64, 16), (128, 1), (128, 16)]
    assert found[0].key == ("gemm", "w4a16:group_size=128", "auto", 1, 64, 128)


def test_the_default_sizes_are_those_of_llama_2() -> None:
    assert (22016, 4096) in cases.parse_shapes(cases.SHAPES) and len(cases.parse_shapes(cases.SHAPES)) == 6
    assert cases.parse_rows(cases.ROWS)[-1] == 2048
    assert cases.parse_schemes(cases.SCHEMES)[0] == W4A16()
