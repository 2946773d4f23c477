"""What is done before it is asked for: the disk reads on, and threads make ready what comes next.

Both are a little ahead of whoever takes what they give, and no more: memory is bounded, and so is what is done in vain
where somebody stops.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from qjax.checkpoints.files import CheckpointFiles

THREADS = 2  # one of them may wait for memory or the disk while the other, in Python, looks at what it found
WINDOW = 256 << 20  # bytes of a file that the disk is ahead: what it reads in a tenth of a second, or in one


def in_order[T, R](work: Callable[[T], R], items: Iterable[T], *, threads: int = THREADS) -> Generator[R]:
    """Yields `work(item)` of each item, in their order, while threads work at the next ones.

    An error of `work` is raised where its result would come; no item is begun after it.
    """
    with ThreadPoolExecutor(threads, "qjax-ahead") as pool:
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


class ReadAhead:
    """A thread that reads the tensors of modules from the disk before they are taken.

    What is mapped is else read a little at a time, where it is first touched, and whoever touches it waits. It goes
    into the system's own cache. Used with `with`; without effect where the system does not say what is there already
    (macOS, Windows).
    """

    def __init__(self, files: CheckpointFiles, *, window: int = WINDOW) -> None:
        """Of `files`, up to `window` bytes ahead, or one module more."""
        self._files = files
        self._window = window
        self._wanted: deque[str] = deque()
        self._ahead = 0  # bytes that were read and not taken
        self._closed = not hasattr(os, "RWF_NOWAIT")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="qjax-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def want(self, modules: Sequence[str]) -> None:
        """Modules that will be taken after those that were named before, in this order."""
        with self._changed:
            self._wanted.extend(modules)
            self._changed.notify()

    def taken(self, module: str) -> None:
        """A module was read."""
        with self._changed:
            self._ahead -= self._size(module)
            self._changed.notify()

    def _size(self, module: str) -> int:
        return sum(entry.stop - entry.start for entry in map(self._files.entry, self._files.names_in(module)))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._wanted and self._ahead < self._window))
                if self._closed:
                    return
                module = self._wanted.popleft()
                self._ahead += self._size(module)
                late = self._ahead <= 0  # it has been read by now
            if not late and not self._files.read_ahead(module):
                return
