"""What `choose` chose for many products, as a table: text, HTML, or rows for somebody else's."""

import dataclasses
import html
from collections.abc import Iterable

from qjax import devices
from qjax.devices import Device
from qjax.dispatch.choose import choose
from qjax.dispatch.problem import Problem
from qjax.dispatch.quantizer import choose_quantizer
from qjax.dispatch.routes import ROUTES, Route
from qjax.errors import BackendError

COLUMNS = ("layer", "m x k x n", "scheme", "kernel", "reason")


@dataclasses.dataclass(frozen=True)
class Row:
    """One product: what runs it and why, and `(kernel, reason)` of each kernel that does not."""

    layer: str
    shape: str
    scheme: str
    kernel: str
    reason: str
    others: tuple[tuple[str, str], ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """The values of `COLUMNS`."""
        return self.layer, self.shape, self.scheme, self.kernel, self.reason


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Rows, the device they are for, and notes that concern them all. Prints itself."""

    rows: tuple[Row, ...]
    device: Device
    notes: tuple[str, ...] = ()

    @property
    def not_taken(self) -> dict[tuple[str, str], int]:
        """`(kernel, reason)` of kernels that were not taken -> for how many rows."""
        counts: dict[tuple[str, str], int] = {}
        for row in self.rows:
            for other in row.others:
                counts[other] = counts.get(other, 0) + 1
        return counts

    @property
    def _footnotes(self) -> list[str]:
        total = len(self.rows)
        return [
            f"{kernel} not taken: {reason}" + (f" ({n} of {total} layers)" if total > 1 else "")
            for (kernel, reason), n in self.not_taken.items()
        ]

    def __str__(self) -> str:
        lines = [COLUMNS, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([f"on {self.device}", *padded, *self._footnotes, *self.notes])

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        table = line("th", COLUMNS) + "".join(line("td", row.cells) for row in self.rows)
        below = "<br>".join(html.escape(text) for text in [*self._footnotes, *self.notes])
        return f"<p>on {html.escape(str(self.device))}</p><table>{table}</table><p>{below}</p>"


def _quantizing(problem: Problem, device: Device, backend: str | None) -> str:
    """Who makes the codes of x; nothing where x is as it is."""
    activation = problem.scheme.activation
    if activation is None or problem.transposed:
        return ""
    row = choose_quantizer(activation, problem.k, device, backend)
    whole = {"token": "a scale a token", "tensor": "one scale", "block": "a scale for each 128 of K"}
    what = f"x as {activation.format}, {activation.mode}, {whole[activation.granularity]}"
    return f"{what}: {'XLA, by the formula' if row is None else row.name}"


def explain_rows(
    named_problems: Iterable[tuple[str, Problem]],
    device: Device | None = None,
    backend: str | None = None,
    routes: tuple[Route, ...] = ROUTES,
) -> Explanation:
    """What runs each of the products, by the very `choose` that runs them.

    Raises:
      BackendError: as `choose`, with the layer's name in front.
    """
    device = devices.current() if device is None else device
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for layer, problem in named_problems:
        try:
            choice = choose(problem, device, backend, routes)
        except BackendError as error:
            raise BackendError(f"{layer}: {error}") from error
        rows.append(
            Row(
                layer,
                problem.shape,
                str(problem.scheme),
                choice.route.name,
                choice.reason,
                choice.reasons,
            )
        )
        notes |= dict.fromkeys((choice.note, _quantizing(problem, device, backend)))
    if device.estimated:
        notes[f"times are rough: the row of {device.name} is estimated ({device.source})"] = None
    return Explanation(tuple(rows), device, tuple(note for note in notes if note))


def explain_problem(
    problem: Problem,
    device: Device | None = None,
    backend: str | None = None,
    routes: tuple[Route, ...] = ROUTES,
) -> Explanation:
    """What runs one product; see `explain_rows`."""
    return explain_rows([("-", problem)], device, backend, routes)
