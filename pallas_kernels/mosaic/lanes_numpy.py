"""`lanes` in NumPy: every register an array `[programs, warps, 32]`, all lanes in step.

Reads and writes beyond an array's end raise; bytes of shared memory whose copy has not been awaited, or that nobody
wrote, read as NaN patterns; so does a lane's wrong count of groups show.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pairs import MAGIC, TABLES

_UNWRITTEN = 0x7FC1FFFF  # NaN as float32 and as a pair of bfloat16 or float16
_16_BITS = {name: jnp.dtype(name) for name in ("bfloat16", "float16")}


class Pointer:
    """Bytes of an array, and where in it each lane is."""

    def __init__(self, data: np.ndarray, at: Any) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.at + offset)

    def bytes(self, first: int, size: int, when: np.ndarray) -> np.ndarray:
        """`[..., size]` of each lane, of lanes that are not `when` zeros."""
        at = np.where(when, self.at + first, 0)
        if (at + size > self.data.size).any() or (at < 0).any():
            raise IndexError(f"bytes {at.min()} to {at.max() + size} of an array of {self.data.size}")
        assert (at % min(size, 16) == 0).all(), f"{size} bytes at an odd place"
        return np.where(when[..., None], self.data[at[..., None] + np.arange(size)], 0)


class NumpyLanes:
    """Runs a program on all lanes at once.

    Attributes:
      lane, warp, thread, program: where each is.
    """

    def __init__(self, programs: int, warps: int, shared: dict[str, int]) -> None:
        """shared: bytes of arrays in shared memory."""
        shape = (programs, warps, 32)
        self.program, self.warp, self.lane = np.indices(shape)
        self.thread = 32 * self.warp + self.lane
        self._shared = {name: np.full((programs, size // 4), _UNWRITTEN, np.uint32) for name, size in shared.items()}
        self._group: list[Any] = []
        self._groups: list[list[Any]] = []

    def integer(self, value: int) -> np.ndarray:
        """A constant, 64 bits wide here."""
        return np.full(self.lane.shape, value)

    def real(self, value: float) -> np.ndarray:
        """A float32 constant."""
        return np.full(self.lane.shape, value, np.float32)

    def minimum(self, a: np.ndarray, b: Any) -> np.ndarray:
        """The smaller one."""
        return np.minimum(a, b)

    def choose(self, condition: np.ndarray, a: Any, b: Any) -> np.ndarray:
        """By `np.where`."""
        return np.where(condition, a, b)

    def repeat(self, times: int, body: Callable[..., Sequence[Any]], carry: Sequence[Any]) -> list[Any]:
        """A Python loop."""
        for i in range(times):
            carry = body(self.integer(i), *carry)
        return list(carry)

    def pointer(self, array: np.ndarray) -> Pointer:
        """At the first byte."""
        return Pointer(array.reshape(-1).view(np.uint8), self.integer(0))

    def load(self, at: Pointer, size: int, offset: int = 0, when: np.ndarray | None = None) -> list[np.ndarray]:
        """By indexing bytes."""
        found = at.bytes(offset, size, np.broadcast_to(True if when is None else when, self.lane.shape))
        unit = min(size, 4)
        words = found.reshape(*self.lane.shape, size // unit, unit).astype(np.int64)
        return list(np.moveaxis((words << (8 * np.arange(unit))).sum(-1), -1, 0))

    def store(self, at: Pointer, value: np.ndarray, dtype: str, when: np.ndarray) -> None:
        """Each element at most once."""
        out = at.data.view(jnp.dtype(dtype))
        where = at.at[when] // out.itemsize
        if len(np.unique(where)) != len(where):
            raise IndexError("two lanes write the same element")
        out[where] = value[when].astype(out.dtype)

    def _words(self, name: str, at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices `[..., count]` of words in a shared array."""
        assert (at % (4 * count) == 0).all(), f"{name}: {count} words at an odd place"
        return self.program[..., None], at[..., None] // 4 + np.arange(count)

    def copy(
        self, name: str, to: np.ndarray, offset: int, at: Pointer, from_offset: int, size: int, when: np.ndarray,
        at_all: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Poisons the place until it is awaited."""
        taken = np.broadcast_to(True if at_all is None else at_all, self.lane.shape)
        programs, words = self._words(name, np.where(taken, to + offset, 0), size // 4)
        where = np.broadcast_to(programs, words.shape)[taken], words[taken]
        self._shared[name][where] = _UNWRITTEN
        found = at.bytes(from_offset, size, when).astype(np.uint8).reshape(*self.lane.shape, size).view(np.uint32)
        self._group.append((name, where, found[taken]))

    def commit(self) -> None:
        """Closes the group."""
        self._groups.append(self._group)
        self._group = []

    def wait(self, but: int) -> None:
        """Lets the oldest groups arrive."""
        while len(self._groups) > but:
            for name, where, words in self._groups.pop(0):
                self._shared[name][where] = words

    def read(self, name: str, at: np.ndarray, size: int, offset: int = 0) -> list[np.ndarray]:
        """Words of shared memory."""
        words = self._shared[name][self._words(name, at + offset, size // 4)]
        return list(np.moveaxis(words.astype(np.int64), -1, 0))

    def read_matrices(self, name: str, at: np.ndarray) -> list[np.ndarray]:
        """Each lane gathers from where eight others point."""
        found, word = [], np.arange(32) % 4
        for j in range(4):
            there = at[..., 8 * j + np.arange(32) // 4]
            assert (there % 16 == 0).all(), "a matrix at an odd place"
            found.append(self._shared[name][self._words(name, there + 4 * word, 1)][..., 0].astype(np.int64))
        return found

    def read_real(self, name: str, at: np.ndarray, offset: int = 0, when: np.ndarray | None = None) -> np.ndarray:
        """A float32 of shared memory."""
        taken = np.broadcast_to(True if when is None else when, self.lane.shape)
        found = self._shared[name][self._words(name, np.where(taken, at + offset, 0), 1)][..., 0].view(np.float32)
        return np.where(taken, found, np.float32(0))

    def write_real(
        self, name: str, at: np.ndarray, offset: int, value: np.ndarray, when: np.ndarray | None = None
    ) -> None:
        """A float32 to shared memory."""
        taken = np.broadcast_to(True if when is None else when, self.lane.shape)
        which, word = (a[..., 0][taken] for a in self._words(name, np.where(taken, at + offset, 0), 1))
        self._shared[name][which, word] = value.view(np.uint32)[taken]

    def warp_barrier(self) -> None:
        """Nothing: all lanes are in step."""

    def barrier(self) -> None:
        """Nothing: all lanes are in step."""

    def wait_for_launch_before(self) -> None:
        """Nothing: here it has ended."""

    def let_next_launch_begin(self) -> None:
        """Nothing: it begins when this one has ended."""

    def sum_of_lanes(self, value: np.ndarray) -> np.ndarray:
        """By NumPy's sum."""
        return np.broadcast_to(value.sum(-1, keepdims=True, dtype=np.float32), value.shape)

    def inverse_root(self, value: np.ndarray) -> np.ndarray:
        """By the definition."""
        return (1 / np.sqrt(value)).astype(np.float32)

    def silu(self, value: np.ndarray) -> np.ndarray:
        """By the definition."""
        return (value / (1 + np.exp(-value))).astype(np.float32)

    def pair(self, word: np.ndarray, nibble: int, weight: str, dtype: str, less: np.ndarray | None) -> np.ndarray:
        """By the definition of the format."""
        form, halves = _16_BITS[dtype], []
        for half in (0, 1):
            code = (word >> (16 * half + 4 * nibble)) & 15
            if weight == "int4":
                minus = np.float32(-MAGIC[dtype][1] - 8) if less is None else _halves(less, form)[half]
                value = (code + MAGIC[dtype][1]).astype(np.float32) + minus
            else:
                value = np.array(TABLES[weight], np.float32)[code]
            halves.append(value.astype(form).view(np.uint16).astype(np.int64))
        return halves[0] | (halves[1] << 16)

    def offset_pair(self, word: np.ndarray, nibble: int, dtype: str) -> np.ndarray:
        """By the definition."""
        halves = [((word >> (16 * half + 4 * nibble)) & 15) + MAGIC[dtype][1] for half in (0, 1)]
        low, high = (h.astype(_16_BITS[dtype]).view(np.uint16).astype(np.int64) for h in halves)
        return low | (high << 16)

    def byte_pair(self, word: np.ndarray, second: int, weight: str, dtype: str) -> np.ndarray:
        """By the definition of the format."""
        form, of_code = _16_BITS[dtype], {"int8": np.dtype(np.int8), "e4m3": jnp.dtype("float8_e4m3fn")}[weight]
        low, high = (
            ((word >> (8 * (2 * second + i))) & 255).astype(np.uint8).view(of_code).astype(form).view(np.uint16)
            for i in (0, 1)
        )
        return low.astype(np.int64) | (high.astype(np.int64) << 16)

    def both(self, value: np.ndarray, dtype: str) -> np.ndarray:
        """A float32 in both halves, rounded."""
        half = value.astype(_16_BITS[dtype]).view(np.uint16).astype(np.int64)
        return half | (half << 16)

    def as_reals(self, word: np.ndarray, dtype: str) -> list[np.ndarray]:
        """By viewing the bits."""
        form = jnp.dtype(dtype)
        bits = 8 * form.itemsize
        parts = [(word >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
        return [part.astype(f"uint{bits}").view(form).astype(np.float32) for part in parts]

    def fma(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Rounded once."""
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`a + b`."""
        return a + b

    def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`a * b`."""
        return a * b

    def mma(
        self, a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray], dtype: str
    ) -> list[np.ndarray]:
        """By `einsum` in float64."""
        form, lanes = _16_BITS[dtype], (*self.lane.shape[:2], 8, 4)

        def of_lanes(register: np.ndarray) -> np.ndarray:  # [..., r, 2 c + l]
            return np.stack(_halves(register, form), -1).reshape(*lanes[:3], 8)

        rows = [np.concatenate([of_lanes(a[half]), of_lanes(a[2 + half])], -1) for half in (0, 1)]
        x = np.concatenate([of_lanes(b[0]), of_lanes(b[1])], -1)
        found = []
        for half in (0, 1):
            product = np.einsum("pwrk,pwnk->pwrn", rows[half], x, dtype=np.float64, casting="unsafe")
            found += [product.reshape(*lanes, 2)[..., i].reshape(self.lane.shape) for i in (0, 1)]
        return [(part + old).astype(np.float32) for part, old in zip(found, c, strict=True)]


def _halves(register: np.ndarray, form: Any) -> list[np.ndarray]:
    """Both values of a pair, in float32."""
    return [((register >> shift) & 0xFFFF).astype(np.uint16).view(form).astype(np.float32) for shift in (0, 16)]
