"""Figures of a comparison. They belong to no window: `savefig` writes them."""

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.quality.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 256  # columns of a map; wider layers have several channels a column, the worst of which is shown
LEAST_KL = 1e-7  # nats; below that it is rounding


def plot_sqnr(comparison: Comparison) -> "Figure":
    """SQNR of layers against their number: of the outputs as they are, and of each layer by itself."""
    figure = _figure(10, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for layer in comparison.layers:
        number = re.search(r"\d+", layer.path)
        kind = re.sub(r"\d+", "*", layer.path)
        lines.setdefault(kind, []).append((int(number[0]) if number else 0, layer.sqnr, layer.own_sqnr))
    for name, points in lines.items():
        at, *series = (np.array(values, float) for values in zip(*points, strict=True))
        for panel, values in zip(panels, series, strict=True):
            seen = np.isfinite(values)
            panel.plot(at[seen], values[seen], marker="o", markersize=3, linewidth=1.2, label=name)
            panel.xaxis.get_major_locator().set_params(integer=True)
    for panel, title in zip(panels, ("with all layers before it", "by itself, on the base's input"), strict=True):
        _finish(panel, title, "layer", "SQNR, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def plot_kl(comparison: Comparison) -> "Figure":
    """How KL is distributed over predictions, and its mean by position in the window."""
    figure = _figure(10, 3.2)
    left, right = figure.subplots(1, 2)
    values = np.maximum(comparison.kl.ravel(), LEAST_KL)
    top = max(float(values.max()), 10 * LEAST_KL)
    left.hist(values, bins=np.geomspace(LEAST_KL, top, 80))
    left.axvline(max(comparison.mean_kl, LEAST_KL), color="black", linewidth=0.8, label="mean")
    left.set_xscale("log")
    left.legend(fontsize=8, frameon=False)
    _finish(left, "predictions by KL", "KL, nats", "predictions")
    means = comparison.kl.mean(axis=0)
    width = math.ceil(len(means) / 64)
    starts = np.arange(0, len(means), width)
    right.plot(starts + 1, np.add.reduceat(means, starts) / np.diff([*starts, len(means)]), linewidth=1.2)
    right.set_ylim(bottom=0)
    _finish(right, "by position", "position in the window", "mean KL, nats")
    return figure


def plot_outliers(comparison: Comparison) -> "Figure":
    """A map of layers by input channels: max |x| over the root mean square of all of x, in the base."""
    rows = {layer.path: ratios for layer in comparison.layers if (ratios := layer.outliers()) is not None}
    return _map(rows, np.maximum, "input channel", "max |x| / rms", logarithmic=True)


def plot_channels(comparison: Comparison) -> "Figure":
    """A map of layers by output channels: the SQNR of each, by itself."""
    rows = {layer.path: layer.channel_sqnr() for layer in comparison.layers}
    return _map(rows, np.minimum, "output channel", "SQNR, dB", logarithmic=False)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(panel: "Axes", title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.tick_params(labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _map(rows: dict[str, np.ndarray], worst: np.ufunc, x: str, what: str, *, logarithmic: bool) -> "Figure":
    """One line of colours a layer, narrow layers stretched; infinities are left white."""
    from matplotlib.colors import LogNorm

    figure = _figure(10, 1.4 + 0.16 * min(len(rows), 120))
    panel = figure.subplots()
    image = np.stack([_binned(values, worst) for values in rows.values()])
    finite = image[np.isfinite(image) & ((image > 0) | (not logarithmic))]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 2.0)
    scale: dict[str, Any] = {"norm": LogNorm(low, high)} if logarithmic else {"vmin": low, "vmax": high}
    shown = np.ma.masked_invalid(image)
    cmap = "magma" if logarithmic else "viridis"
    drawn = panel.imshow(shown, aspect="auto", interpolation="nearest", cmap=cmap, extent=(0, 1, len(rows), 0), **scale)
    every = math.ceil(len(rows) / 60)
    panel.set_yticks(np.arange(0, len(rows), every) + 0.5, list(rows)[::every], fontsize=6)
    panel.set_xticks([0, 1], ["first", "last"], fontsize=8)
    panel.set_xlabel(x, fontsize=9)
    figure.colorbar(drawn, ax=panel, label=what, pad=0.01)
    return figure


def _binned(values: np.ndarray, worst: np.ufunc) -> np.ndarray:
    """The worst of each of `BINS` stretches of channels; fewer channels are repeated."""
    at = np.arange(BINS) * len(values) // BINS
    return worst.reduceat(values, at)
