"""`page`: a comparison as one HTML page that needs no network: tables, and plots as data URIs."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qjax.quality.comparison import LAYER_COLUMNS, QUANTILES, Comparison
from qjax.quality.plots import plot_channels, plot_kl, plot_outliers, plot_sqnr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 4  # channels that the table of layers names

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; } p { color: #555; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.15rem 1rem 0.15rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; }
"""


def page(comparison: Comparison, *, title: str = "Quality", facts: Mapping[str, str] | None = None) -> str:
    """A whole HTML document.

    Args:
      comparison: of `qjax.compare`.
      title: its heading.
      facts: more lines for the first table, such as folders and bytes.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _table((), [*(facts or {}).items(), *_figures_of_merit(comparison)])]
    parts += [
        "<h2>Predictions</h2>",
        "<p>KL(base || model) of each predicted token.</p>",
        _image(plot_kl(comparison), "distribution of KL, and KL by position"),
    ]
    if comparison.layers:
        parts += [
            "<h2>Layers</h2>",
            "<p>SQNR of what layers put out: the power of the base's outputs over that of the difference.</p>",
            _image(plot_sqnr(comparison), "SQNR of each layer"),
            "<h2>Output channels</h2>",
            "<p>The same for each output of a layer by itself; where the model is exact it is white.</p>",
            _image(plot_channels(comparison), "map of SQNR"),
        ]
    if any(layer.input_peak is not None for layer in comparison.layers):
        parts += [
            "<h2>Outliers</h2>",
            "<p>How far the largest input of each channel lies above the layer's root mean square, in the base. Bright "
            "columns are what makes activations hard to quantize.</p>",
            _image(plot_outliers(comparison), "map of outliers"),
        ]
    if comparison.layers:
        rows = [layer.cells(NAMED) for layer in comparison.layers]
        parts += ["<h2>All layers</h2>", _table(LAYER_COLUMNS, rows, right=(3, 4))]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _figures_of_merit(comparison: Comparison) -> list[tuple[str, str]]:
    found = comparison.to_json(0)
    change = comparison.perplexity / comparison.base_perplexity - 1
    quantiles = ", ".join(f"{q:.1%} below {found['kl_quantiles'][f'{q:g}']:.4g}" for q in QUANTILES)
    return [
        ("perplexity", f"{comparison.perplexity:.4f}, base {comparison.base_perplexity:.4f} ({change:+.2%})"),
        ("KL, nats", f"mean {comparison.mean_kl:.5f}, largest {found['kl_max']:.4g}; {quantiles}"),
        ("same likeliest token", f"{comparison.top1:.2%}"),
        ("predictions", f"{found['tokens']:,} in {found['windows']:,} windows"),
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: tuple[int, ...] = ()) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="n"' if i in right else "" for i in range(len(cells)))
        return "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    head = f"<tr>{line('th', heads)}</tr>" if heads else ""
    return f"<table>{head}{''.join(f'<tr>{line("td", row)}</tr>' for row in rows)}</table>"


def _image(figure: "Figure", what: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'
