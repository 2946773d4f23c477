"""Tables on standard output: drawn by rich on a terminal, columns of plain text elsewhere."""

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

FOLDED_ABOVE = 30  # characters: a narrower column keeps its width on a narrow terminal


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    right: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> None:
    """Prints a table.

    Args:
      columns: their headings.
      rows: a cell for each; None is an empty one.
      title: a line above.
      right: the columns aligned to the right.
      notes: lines below.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    draw = _drawn if sys.stdout.isatty() else _plain
    draw(list(columns), cells, title, frozenset(right), list(notes))


def _drawn(columns: list[str], cells: list[list[str]], title: str, right: frozenset[str], notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    needed = 0
    for column in zip(columns, *cells, strict=True):
        width = min(max(map(len, column)), FOLDED_ABOVE)
        justify: Literal["left", "right"] = "right" if column[0] in right else "left"
        table.add_column(Text(column[0]), justify=justify, min_width=width, overflow="fold")
        needed += width + 2
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    # A terminal wraps a line that is too long; rich, left to itself, would fold numbers.
    console = Console(width=max(Console().width, needed))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"))


def _plain(columns: list[str], cells: list[list[str]], title: str, right: frozenset[str], notes: list[str]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(row: list[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [*filter(None, [title]), *map(line, [columns, *cells]), *notes]
    print("\n".join(lines))
