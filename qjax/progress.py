"""A progress bar for work that turns out to be long, on a terminal that somebody may be watching; else nothing."""

import sys
import time
from collections.abc import Iterator, Sequence

PATIENCE = 2.0  # seconds before a bar appears


def track[T](items: Sequence[T], what: str, *, show: bool | None = None) -> Iterator[T]:
    """Yields `items`, with a bar on stderr that says how many are done.

    Args:
      items: the pieces of work.
      what: such as "quantizing".
      show: True for a bar at once, False for none, None for one after two seconds if stderr is a terminal.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    started, done = time.monotonic(), 0
    while show is None and done < len(items) and time.monotonic() - started < PATIENCE:
        yield items[done]
        done += 1
    if done == len(items):
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=len(items), completed=done)
        for item in items[done:]:
            yield item
            bar.advance(task)
