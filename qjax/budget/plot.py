"""What is lost against what it weighs: the front of mixtures, uniform schemes, and the one that was found."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qjax.budget.mixture import Mixture


def plot_front(mixture: "Mixture") -> "Figure":
    """A figure that belongs to no window: `savefig` writes it. What loses nothing has no place on its axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel = figure.subplots()
    front = [point for point in mixture.front() if point.loss > 0]
    panel.plot([p.bits for p in front], [p.loss for p in front], linewidth=1.2, label="mixed")
    uniform = [point for point in mixture.uniform() if point.loss > 0]
    panel.scatter([p.bits for p in uniform], [p.loss for p in uniform], marker="s", s=18, color="grey", label="uniform")
    for point in uniform:
        panel.annotate(point.name, (point.bits, point.loss), (4, 4), textcoords="offset points", fontsize=6)
    found = mixture.point
    if found.loss > 0:
        panel.scatter([found.bits], [found.loss], marker="*", s=120, color="crimson", label="found", zorder=3)
    panel.set_yscale("log")
    panel.set_xlabel("bits a weight", fontsize=9)
    panel.set_ylabel("expected loss", fontsize=9)
    panel.grid(alpha=0.25, linewidth=0.5, which="both")
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return figure
