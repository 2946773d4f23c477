"""Speedup over bfloat16 against the number of rows, measured and expected; tokens a second by scheme and batch."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qjax.bench.predict import Prediction
from qjax.bench.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct to most colour-blind eyes: Paul Tol's bright scheme, and three of his muted one.
COLOURS = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777", "#332288", "#999933", "#882255",
)  # fmt: skip
MARKERS = "osD^vP*"
PANELS_A_ROW = 3
TICKS = (0.0625, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)


def plot_speedups(records: Iterable[Record], predictions: Iterable[Prediction] = (), title: str = "") -> "Figure":
    """One panel for each (N, K): a solid line for each scheme and backend, a dashed one for each scheme's prediction.

    Args:
      records: of `gemm`.
      predictions: of any of the sizes, or of others.
      title: such as the device.

    Returns:
      A figure that belongs to no window: `savefig` writes it.
    """
    from matplotlib.figure import Figure

    records, predictions = list(records), list(predictions)
    shapes = list(dict.fromkeys([(r["n"], r["k"]) for r in records] + [(p.n, p.k) for p in predictions]))
    schemes = dict.fromkeys([r["scheme"] for r in records] + [p.scheme for p in predictions])
    colours = {scheme: COLOURS[i % len(COLOURS)] for i, scheme in enumerate(schemes)}
    markers = {b: MARKERS[i % len(MARKERS)] for i, b in enumerate(dict.fromkeys(r["backend"] for r in records))}
    columns = min(PANELS_A_ROW, max(1, len(shapes)))
    rows = max(1, -(-len(shapes) // columns))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for (n, k), panel in zip(shapes, panels, strict=False):
        _draw(panel, [r for r in records if (r["n"], r["k"]) == (n, k)], colours, markers)
        _draw_predictions(panel, [p for p in predictions if (p.n, p.k) == (n, k)], colours)
        panel.set_title(f"{n} x {k}", fontsize=10)
    for panel in list(panels):
        panel.set_visible(False)
    handles = _legend(colours, markers, bool(predictions))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _legend(colours: dict[str, str], markers: dict[str, str], predicted: bool) -> list[Any]:
    """A line for each colour, and a grey one for each marker and for the dashes."""
    from matplotlib.lines import Line2D

    found = [Line2D([], [], color=colour, label=scheme) for scheme, colour in colours.items()]
    found += [Line2D([], [], color="grey", marker=marker, label=backend) for backend, marker in markers.items()]
    if predicted:
        found.append(Line2D([], [], color="grey", linestyle="--", linewidth=1, label="roofline"))
    return found


def _draw(panel: "Axes", records: Sequence[Record], colours: dict[str, str], markers: dict[str, str]) -> None:
    """Measured lines, and the axes."""
    for scheme, backend in dict.fromkeys((r["scheme"], r["backend"]) for r in records):
        mine = sorted((r["m"], r["speedup"]) for r in records if (r["scheme"], r["backend"]) == (scheme, backend))
        style: dict[str, Any] = dict(color=colours[scheme], marker=markers[backend], markersize=4, linewidth=1.5)
        panel.plot(*zip(*mine, strict=True), **style)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_yticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("rows of x", fontsize=9)
    panel.set_ylabel("speedup over bf16", fontsize=9)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.tick_params(labelsize=8)
    panel.label_outer()
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_predictions(panel: "Axes", predictions: Sequence[Prediction], colours: dict[str, str]) -> None:
    for scheme in dict.fromkeys(p.scheme for p in predictions):
        mine = sorted((p.m, p.speedup) for p in predictions if p.scheme == scheme)
        style: dict[str, Any] = dict(color=colours[scheme], linestyle="--", linewidth=1, alpha=0.8)
        panel.plot(*zip(*mine, strict=True), **style)


def plot_tokens(records: Iterable[Record], title: str = "") -> "Figure":
    """Tokens a second of all rows together against rows: a panel for each model, a line for each scheme.

    Args:
      records: of `decode`; beside a point is how many times the dense model's it is.
      title: such as the device.
    """
    from matplotlib.figure import Figure

    records = list(records)
    models = list(dict.fromkeys((r["model"], r["prompt"], r["gpus"]) for r in records))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(map(_decode_name, records)))}
    figure = Figure(figsize=(4.8 * max(1, len(models)), 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(models)), squeeze=False).flat
    for (model, prompt, gpus), panel in zip(models, panels, strict=False):
        mine = [r for r in records if (r["model"], r["prompt"], r["gpus"]) == (model, prompt, gpus)]
        for name in dict.fromkeys(map(_decode_name, mine)):
            some = sorted((r for r in mine if _decode_name(r) == name), key=lambda r: r["batch"])
            panel.plot([r["batch"] for r in some], [r["tok_s"] for r in some], "o-", markersize=4, color=colours[name])
            for r in some:
                if r["speedup"] is not None:
                    said = f"{r['speedup']:.2f}x"
                    panel.annotate(said, (r["batch"], r["tok_s"]), (4, 4), textcoords="offset points", fontsize=7)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.margins(0.15)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
        panel.set_title(f"{model}, prompts of {prompt}" + (f", {gpus} GPUs" if gpus > 1 else ""), fontsize=10)
        panel.set_xlabel("rows", fontsize=9)
        panel.set_ylabel("tokens a second", fontsize=9)
        panel.grid(alpha=0.25, linewidth=0.5)
    handles = _legend(colours, {}, predicted=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _decode_name(record: Record) -> str:
    """What a line stands for."""
    cache = "" if record["cache"] == "dense" else f", {record['cache']} cache"
    backend = "" if record["backend"] == "auto" else f" by {record['backend']}"
    return record["scheme"] + backend + cache
