"""What writing text takes of a device's memory; where that is too little, what would fit."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from qjax import devices
from qjax.errors import GenerationError

_USABLE = 0.9  # of a device's memory: the rest is scratch, other programs, gaps


@contextlib.contextmanager
def memory_explained(
    state: nnx.State, empty_cache: Callable[[], Any], *, rows: int, capacity: int, coded: bool
) -> Iterator[None]:
    """Runs what is inside; where XLA runs out of memory, a GenerationError says what takes it and what would fit.

    Args:
      state: of the model, on its devices.
      empty_cache: makes the cache of one row of `capacity` tokens; it is asked for shapes only.
      rows: of the batch.
      coded: whether the cache is of 8 bits.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = _what_fits(state, jax.eval_shape(empty_cache), rows, capacity)
        raise GenerationError(said if coded else f'{said}; cache_dtype="int8" takes about half') from error


def _what_fits(state: nnx.State, row: Any, rows: int, capacity: int) -> str:
    """What weights and cache take of a device, and how many rows or tokens it has room for; `row`: a row's shapes."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", devices.current().memory)
    leaves = jax.tree.leaves(state)
    weights = sum(a.addressable_shards[0].data.nbytes for a in leaves)
    # A cache is cut by heads over the devices that the weights are cut over.
    share = weights / sum(a.nbytes for a in leaves)
    a_token = share * sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(row)) / capacity
    tokens = max(0, int((_USABLE * memory - weights) / a_token))
    said = (
        f"out of memory: of {memory / 1e9:.2f} GB on a device weights take {weights / 1e9:.2f} GB, a cache of {rows} "
        f"rows of {capacity} tokens {rows * capacity * a_token / 1e9:.2f} GB; "
    )
    if tokens < rows:
        return f"{said}weights of fewer bits, or a mesh of more devices, leave room for a cache"
    if tokens >= rows * capacity:
        return f"{said}they would fit: what is left is too little to read so many prompts at once"
    return f"{said}there is room for about {tokens // capacity} such rows, or for {rows} of {tokens // rows} tokens"
