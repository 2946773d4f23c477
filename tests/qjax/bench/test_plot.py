"""Plots and predictions: what is drawn is what was measured and what the table says."""

from pathlib import Path

import pytest

from qjax import devices
from qjax.bench.plot import plot_speedups, plot_tokens
from qjax.bench.predict import predict
from qjax.schemes import NF4, W4A16, W8A8FP8, W8A8Int8

H200, V100 = (devices.find_device(name) for name in ("H200", "V100"))


def record(scheme: str, backend: str, m: int, speedup: float, n: int = 64) -> dict:
    return {"scheme": scheme, "backend": backend, "m": m, "n": n, "k": 128, "speedup": speedup}


def test_lines_are_the_measured_points_in_order_of_m() -> None:
    rows = [record("nf4", "auto", 16, 2.0), record("nf4", "auto", 1, 3.0), record("nf4", "xla", 1, 0.5)]
    figure = plot_speedups(rows, [predict(H200, NF4(), m, 64, 128) for m in (1, 16)], title="H200")
    (panel,) = [axes for axes in figure.axes if axes.get_visible()]
    lines = [tuple(map(list, line.get_data())) for line in panel.lines]
    assert ([1, 16], [3.0, 2.0]) in lines and ([1], [0.5]) in lines
    dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1 and list(dashed[0].get_xdata()) == [1, 16]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"nf4", "auto", "xla", "roofline"}


def test_each_shape_has_a_panel_and_what_is_left_over_is_empty(tmp_path: Path) -> None:
    figure = plot_speedups([record("nf4", "auto", 1, 2.0, n) for n in (64, 128, 192, 256)])
    visible = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert visible == ["64 x 128", "128 x 128", "192 x 128", "256 x 128"]
    figure.savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_alone_are_drawn_too() -> None:
    figure = plot_speedups([], [predict(H200, W4A16(), m, 4096, 4096) for m in (1, 2048)])
    assert len(figure.axes) == 1


def test_few_rows_are_bound_by_bytes_and_many_by_operations() -> None:
    one, many = (predict(H200, W4A16(), m, 22016, 4096) for m in (1, 2048))
    assert (one.bound, many.bound) == ("memory", "compute")
    assert one.bytes == 22016 * 4096 // 2 + 22016 * 32 * 2 + (4096 + 22016) * 2
    assert one.operations == 2 * 22016 * 4096
    assert 3.5 < one.speedup < 4 and many.speedup == pytest.approx(1.0)


def test_quantized_x_pays_where_the_tensor_cores_take_it() -> None:
    assert predict(H200, W8A8Int8(), 2048, 8192, 8192).speedup == pytest.approx(2.0, rel=0.02)
    assert predict(H200, W8A8FP8(), 2048, 8192, 8192).speedup == pytest.approx(2.0, rel=0.02)
    assert predict(V100, W4A16(), 1, 4096, 4096).speedup > 3


def written(scheme: str, batch: int, tok_s: float, speedup: float | None = None, **others: object) -> dict:
    size = {"model": "llama", "backend": "auto", "cache": "dense", "prompt": 512, "gpus": 1}
    return {**size, "scheme": scheme, "batch": batch, "tok_s": tok_s, "speedup": speedup, **others}


def test_tokens_a_second_are_a_line_a_scheme_and_say_how_many_times_the_dense_ones() -> None:
    rows = [written("dense", 1, 250.0), written("dense", 16, 2900.0), written("w4a16", 16, 4200.0, 1.44)]
    rows += [written("w4a16", 1, 520.0, 2.07), written("w4a16", 1, 900.0, 1.9, cache="int8", gpus=2)]
    one, two = plot_tokens(rows, title="H200").axes
    assert (one.get_title(), two.get_title()) == ("llama, prompts of 512", "llama, prompts of 512, 2 GPUs")
    lines = [tuple(map(list, line.get_data())) for line in one.lines]
    assert lines == [([1, 16], [250.0, 2900.0]), ([1, 16], [520.0, 4200.0])]
    assert [text.get_text() for text in one.texts] == ["2.07x", "1.44x"]
    legend = {text.get_text() for text in one.figure.legends[0].get_texts()}
    assert legend == {"dense", "w4a16", "w4a16, int8 cache"}
