"""Explanations: that they say what choose chose, as text and as HTML."""

import numpy as np
import pytest

from qjax.devices import find_device
from qjax.dispatch.choose import choose
from qjax.dispatch.explain import explain_problem, explain_rows
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import ROUTES, Route
from qjax.errors import BackendError
from qjax.schemes import NF4, W4A16

BF16 = np.dtype("bfloat16")
H200 = find_device("H200")
GONE = Route("mosaic.int", "mosaic", "no_such_package.mosaic.int", cc_min=90)
ROWS = (ROUTES[0], GONE)
LAYERS = [
    ("layers.0.up", Problem(1, 11008, 4096, W4A16(group_size=128), x_dtype=BF16, out_dtype=BF16)),
    ("layers.0.<down>", Problem(1, 4096, 11008, NF4(), x_dtype=BF16, out_dtype=BF16)),
]


def test_a_row_says_what_runs_and_why_and_why_nothing_else_does():
    explanation = explain_rows(LAYERS, H200, routes=ROWS)
    row = explanation.rows[0]
    choice = choose(LAYERS[0][1], H200, routes=ROWS)
    assert row.cells == (
        "layers.0.up", "1 x 4096 x 11008", "w4a16:group_size=128", "xla.reference", choice.reason,
    )  # fmt: skip
    assert row.others == (("mosaic.int", "backend absent"),)


def test_the_text_lines_its_columns_up_and_says_each_refusal_once():
    lines = str(explain_rows(LAYERS, H200, routes=ROWS)).splitlines()
    assert lines[0] == "on H200 (compute capability 9.0, 4800 GB/s)"
    assert lines[1].split() == ["layer", "m", "x", "k", "x", "n", "scheme", "kernel", "reason"]
    assert {line.index("xla.reference") for line in lines[2:4]} == {lines[1].index("kernel")}
    assert lines[4:] == ["mosaic.int not taken: backend absent (2 of 2 layers)"]


def test_html_is_a_table_and_escapes_what_it_shows():
    text = explain_rows(LAYERS, H200, routes=ROWS)._repr_html_()
    assert text.count("<tr>") == 3 and "layers.0.&lt;down&gt;" in text and "<down>" not in text
    assert "mosaic.int not taken" in text


def test_a_name_of_hugging_face_is_explained_once():
    text = str(explain_rows(LAYERS, H200, "marlin", routes=ROWS))
    assert text.count("backend 'marlin' names a CUDA kernel") == 1


def test_an_estimated_device_is_said_to_be_one():
    text = str(explain_problem(LAYERS[0][1], find_device("CPU")))
    assert "estimated" in text.splitlines()[0] and "times are rough" in text


def test_one_problem_is_a_table_of_one_row():
    explanation = explain_problem(LAYERS[0][1], H200, routes=ROWS)
    assert len(explanation.rows) == 1
    assert str(explanation).endswith("mosaic.int not taken: backend absent")


def test_a_backend_that_cannot_names_the_layer():
    with pytest.raises(BackendError, match=r"layers\.0\.up: backend 'mosaic' cannot.*absent"):
        explain_rows(LAYERS, H200, "mosaic", routes=ROWS)


def test_no_layers_make_an_empty_table():
    assert explain_rows([], H200).rows == ()
    assert "layer" in str(explain_rows([], H200))
