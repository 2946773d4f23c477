"""Host memory on its way to devices: filled by several threads, in pages and lines that cost least, a shard at a time.

On a CPU a device takes such memory over as it is. Linux gives NumPy's large arrays huge pages, which it has ready
sooner than the small ones that XLA's own buffers are made of.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

_ALIGNMENT = 64  # what XLA asks of memory that it takes over
_HUGE = 2 << 20  # bytes of a huge page: one fault, where small pages are 512
_SPARE = 16  # the end of the last huge page is at most one part of so many
THREADS = min(8, os.cpu_count() or 1)
_ROWS = 64  # rows and columns that are transposed at a time
_COPY = 1 << 21  # bytes that a thread copies at a time


class Deferred(Protocol):
    """An array that is made where a part of it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part, in memory of its own; slices have no step."""


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that XLA can take over without a copy, its values undefined; in whole huge pages where it fills them."""
    size = math.prod(shape) * dtype.itemsize
    alignment = _HUGE if size > _SPARE * (-size % _HUGE) else _ALIGNMENT
    raw = np.empty(size + 2 * alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads, which stay: a tensor takes little longer than to start them."""
    return ThreadPoolExecutor(THREADS)


if hasattr(os, "register_at_fork"):  # a child has none of them
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parallel[T](work: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls `work` on each, on several threads: for NumPy, which lets go of Python's lock."""
    items = list(items)
    if len(items) < 2:
        for item in items:
            work(item)
        return
    list(_pool().map(work, items))


def copied(array: np.ndarray) -> np.ndarray:
    """A C-contiguous copy in memory that XLA can take over; a transposed matrix is turned in small squares."""
    found = empty(array.shape, array.dtype)
    if array.ndim == 0 or array.nbytes <= _COPY:
        found[...] = array
        return found
    copy = _turn if array.ndim == 2 and array.strides[0] < array.strides[1] else np.copyto
    rows = _ROWS * max(1, _COPY * len(array) // (array.nbytes * _ROWS))
    starts = range(0, len(array), rows)
    in_parallel(lambda start: copy(found[start : start + rows], array[start : start + rows]), starts)
    return found


def _turn(found: np.ndarray, array: np.ndarray) -> None:
    """Copies rows of a transposed matrix, by way of squares whose rows are a line longer than they need."""
    buffer = np.empty((_ROWS, _ROWS + _ALIGNMENT // array.itemsize), array.dtype)
    for row in range(0, len(array), _ROWS):
        for column in range(0, array.shape[1], _ROWS):
            square = array[row : row + _ROWS, column : column + _ROWS].T
            part = buffer[: square.shape[0], : square.shape[1]]
            part[...] = square
            found[row : row + _ROWS, column : column + _ROWS] = part.T


def default_platform() -> str:
    """Of the device that arrays go to where none is named: `jax.default_device`'s, which is a thread's own."""
    device = jax.config.jax_default_device  # a jax.Device, a platform's name or None
    return device.platform if isinstance(device, jax.Device) else (device or jax.default_backend())


def ready(array: "np.ndarray | Deferred | jax.Array", platform: str) -> np.ndarray | jax.Array:
    """All of an array, made now, on its way to a device of `platform`; one that is on a device stays there."""
    if isinstance(array, jax.Array):
        return array
    return _part(array, (slice(None),) * len(array.shape), platform)


def put(tree: Any) -> Any:
    """A tree of arrays that are ready, on the default device; the host's memory is not looked at again."""
    return jax.block_until_ready(jax.device_put(tree))


def placed(array: "np.ndarray | Deferred | jax.Array", sharding: Sharding | None = None) -> jax.Array:
    """An array of a file on the devices of `sharding` (of this process), or on the default one.

    A part that a device does not hold is neither read nor made; the host has one part at a time. The file is not looked
    at again.
    """
    if sharding is None:
        found: jax.Array = put(ready(array, default_platform()))
        return found
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    devices: dict[tuple[tuple[int | None, int | None], ...], list[jax.Device]] = {}
    places = sharding.addressable_devices_indices_map(tuple(array.shape))
    for device, index in places.items():
        devices.setdefault(tuple((part.start, part.stop) for part in index or ()), []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for bounds, holders in devices.items():
        part = _part(array, tuple(slice(*bound) for bound in bounds), holders[0].platform)
        for device in holders:
            shards[device] = jax.device_put(part, device).block_until_ready()
    return jax.make_array_from_single_device_arrays(tuple(array.shape), sharding, [shards[d] for d in places])


def _part(array: np.ndarray | Deferred, index: tuple[slice, ...], platform: str) -> np.ndarray:
    """Memory that nobody writes to; on a CPU, where it becomes the device's own, no view of a file."""
    part = array[index]
    if not isinstance(array, np.ndarray) or (platform != "cpu" and part.flags.c_contiguous):
        return part
    return copied(part)
