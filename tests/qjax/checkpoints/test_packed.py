"""Words that are made part by part are parts of the words that are made at once, for every way to hold codes."""

from collections.abc import Callable

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.checkpoints import packed as packed_words
from qjax.checkpoints.buffers import copied, empty, placed
from qjax.checkpoints.codes import Bytes, Codes, NibblesAcross, Ordered, Stream
from qjax.checkpoints.finite import count_bad
from qjax.checkpoints.packed import Packed
from qjax.layouts import pack

N, K = 304, 1312  # no whole tile of rows or blocks; 1312 / 4 = 328
RNG = np.random.default_rng(0)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    return foreign.stream(codes, bits).view(np.uint32)


def along_k(codes: np.ndarray, bits: int) -> Codes:
    return Stream(stream(codes, bits), bits, K)


def k_first(codes: np.ndarray, bits: int) -> Codes:
    return Stream(np.ascontiguousarray(stream(codes, bits).T).T, bits, K)


def padded(codes: np.ndarray, bits: int) -> Codes:
    return Stream(foreign.padded(codes, bits).view(np.uint32), bits, K, "padded")


def high_first(codes: np.ndarray, bits: int) -> Codes:
    return Stream(stream(codes.reshape(N, -1, 2)[..., ::-1].reshape(N, K), bits), bits, K, first="high")


def across(codes: np.ndarray, bits: int) -> Codes:
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    places = np.argsort(order)
    words = stream(codes.T.reshape(K, -1, 8)[..., places].reshape(K, N), bits)
    return NibblesAcross(words, order)


def plain(codes: np.ndarray, bits: int) -> Codes:
    return Bytes(codes.astype(np.uint8) - np.uint8(3), added=3)


def reordered(codes: np.ndarray, bits: int) -> Codes:
    order = RNG.permutation(K)
    return Ordered(along_k(codes[:, np.argsort(order)], bits), order)


CASES = [
    *[(make, bits) for make in (along_k, k_first, padded, reordered) for bits in (2, 3, 4, 5, 6, 7, 8)],
    *[(plain, bits) for bits in (1, 3, 8)],
    (high_first, 4),
    (across, 4),
]


def words(codes: np.ndarray, bits: int, pieces: int = 1) -> np.ndarray:
    """What `QTensor.packed` should be."""
    if bits >= 7:
        return (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    each = codes.reshape(N, pieces, -1)
    filled = np.pad(each, [(0, 0), (0, 0), (0, -each.shape[2] % 128)])
    return np.asarray(pack(jnp.asarray(filled), bits)).reshape(N, -1, 4 * bits)


@pytest.mark.parametrize(("make", "bits"), CASES, ids=[f"{make.__name__} {bits} bits" for make, bits in CASES])
def test_any_part_of_packed_words_can_be_made_alone(make: Callable[[np.ndarray, int], Codes], bits: int) -> None:
    codes = RNG.integers(0, 2**bits, (N, K))
    packed = Packed(make(codes, bits), bits)
    expected = words(codes, bits)
    assert packed.shape == expected.shape and packed.dtype == expected.dtype
    whole = (slice(None),) * expected.ndim
    np.testing.assert_array_equal(packed[whole], expected)
    for rows, columns in (((76, 152), (0, None)), ((3, 200), (2, 5)), ((0, None), (expected.shape[1] - 2, None))):
        part = (slice(*rows), slice(*columns), *whole[2:])
        np.testing.assert_array_equal(packed[part], expected[part])
    if bits < 7:
        np.testing.assert_array_equal(packed.cut(4)[whole], words(codes, bits, pieces=4))


@pytest.mark.parametrize("make", [along_k, k_first, padded, reordered, high_first, across])
def test_nibbles_are_packed_alike_without_the_library(
    make: Callable[[np.ndarray, int], Codes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_words, "_pack_nibbles", lambda: None)
    test_any_part_of_packed_words_can_be_made_alone(make, 4)


def test_copies_are_equal_and_device_memory_as_they_are() -> None:
    array = RNG.normal(size=(1100, 700)).astype(np.float32)
    for given in (array, array.T, array[1:, ::2], array[0], np.float32(3).reshape(())):
        found = copied(given)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, given)
        np.testing.assert_array_equal(placed(given), given)
    array[:] = 0
    assert found.any()


@pytest.mark.parametrize(
    ("size", "alignment"), [(100, 64), (3 << 20, 64), (2 << 20, 2 << 20), ((64 << 20) - 4, 2 << 20)]
)
def test_memory_begins_with_a_huge_page_where_such_pages_are_filled(size: int, alignment: int) -> None:
    found = empty((size // 4,), np.dtype(np.float32))
    assert found.nbytes == size and found.ctypes.data % alignment == 0
    assert found.base is not None and found.base.nbytes == size + 2 * alignment


class Recorder:
    """A deferred array that remembers which parts of it were made."""

    shape = (8, 6)
    dtype = np.dtype(np.int32)

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (range(size)[part] for size, part in zip(self.shape, index, strict=True))
        self.made.append((rows.start, columns.start))
        return np.add.outer(10 * np.array(rows, np.int32), np.array(columns, np.int32))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [(P("a"), [(0, 0), (4, 0)]), (P("a", "b"), [(0, 0), (0, 3), (4, 0), (4, 3)]), (P(), [(0, 0)])],
)
def test_each_shard_is_made_once_and_nothing_else(spec: P, parts: list[tuple[int, int]]) -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    recorder = Recorder()
    found = placed(recorder, NamedSharding(mesh, spec))
    assert recorder.made == parts
    np.testing.assert_array_equal(found, np.add.outer(10 * np.arange(8), np.arange(6)))
    assert found.sharding == NamedSharding(mesh, spec)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu"]
)
def test_nan_and_infinity_are_counted_by_their_bits_as_numpy_counts_them(dtype: str) -> None:
    kind = jnp.dtype(dtype)
    bits = RNG.integers(0, 256, 8 * 4096, dtype=np.uint8)
    bits[: 8 * 64] |= 0x7F  # all exponents
    values = bits.view(kind)
    with np.errstate(invalid="ignore"):
        assert count_bad(values) == np.count_nonzero(~np.isfinite(values.astype(np.float64))) > 0
    assert count_bad(bits) == 0
