"""Element formats as data: what a code of b bits means. Knows nothing of scales, blocks or packing.

A row of `FORMATS` is an integer (the value is the code, see `Format.zero`), a hardware float of 8 bits (the array's own
dtype holds it) or a codebook (`value = codebook[code]`). Adding a format is adding a row, its reference and its test.
Of a codebook of points (`Format.dims`) neighbours along K name one together.

Sources: OCP Microscaling Formats (MX) 1.0 for e2m1 and the exponents `emax`; OCP 8-bit floating point (OFP8) 1.0 for
e4m3fn and e5m2; Dettmers et al., QLoRA (2023), appendix E, for NF4; bitsandbytes' `functional.py` for its FP4 order and
for the signed dynamic map (`dynamic8`) with which it quantizes block maxima.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Literal

import ml_dtypes
import numpy as np

Ties = Literal["even", "away", "lower"]


@dataclasses.dataclass(frozen=True)
class Format:
    """One element format.

    Attributes:
      name: the row's key.
      bits: width of a code in storage; 8 is held one code an array element.
      kind: `int`, `float` (8 bits, a hardware dtype) or `codebook`.
      maximum: largest magnitude: `2^(bits-1) - 1` for integers.
      storage: numpy dtype of the codes where they are not packed into words (8 bits), else "uint8".
      codebook: value of each code, for `codebook` formats; the points one after the other where `dims` is above 1.
      dims: elements of a point: so many neighbours along K share the index `sum_j code[j] << (bits * j)` of theirs.
      ties: where a value half way between two neighbours goes.
      scale_by: what new scales bring to 1: a block's "peak", over `maximum`, or its root mean square.
      emax: exponent of the largest binade (MX scales), for the formats that MX uses.
    """

    name: str
    bits: int
    kind: Literal["int", "float", "codebook"]
    maximum: float
    storage: str = "uint8"
    codebook: tuple[float, ...] | None = None
    dims: int = 1
    ties: Ties = "even"
    scale_by: Literal["peak", "rms"] = "peak"
    emax: int | None = None

    @property
    def zero(self) -> int:
        """The zero point that `zero_point=None` means: codes below 8 bits are unsigned, int8 codes signed."""
        return 2 ** (self.bits - 1) if self.kind == "int" and self.bits < 8 else 0

    @property
    def dtype(self) -> np.dtype:
        """Numpy dtype of unpacked codes."""
        return np.dtype(getattr(ml_dtypes, self.storage, self.storage))


def _symmetric(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Codebook of a sign bit above magnitudes: code `len + i` is minus code `i`, and no negative zero."""
    return magnitudes + tuple(-m if m else 0.0 for m in magnitudes)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Grids that err least on a normal distribution: each point is the mean of what is nearer to it than to the others.
# `python benchmarks/higgs_grids.py` makes them, by bits and by elements of a point.
_HIGGS: dict[str, list[float]] = json.loads(resources.files("qjax").joinpath("higgs_grids.json").read_text())


def _higgs(bits: int, dims: int) -> Format:
    grid = tuple(_HIGGS[f"bits={bits},p={dims}"])
    return Format(
        f"higgs{bits}" + (f"_p{dims}" if dims > 1 else ""), bits, "codebook", max(grid), codebook=grid, dims=dims,
        scale_by="rms",
    )  # fmt: skip


def _dynamic_map() -> tuple[float, ...]:
    """bitsandbytes' signed dynamic map: 7 decades, decade i split into 2^i steps, 0 and 1 added, ascending."""
    values = [0.0, 1.0]
    first, last = np.float32(0.1), np.float32(1.0)
    for i in range(7):
        # As PyTorch makes them: a float32 step from either end, each edge rounded once.
        step = np.float64(np.float32((last - first) / np.float32(2**i)))
        at = np.arange(2**i + 1)
        edges = np.where(at < len(at) // 2, first + step * at, last - step * (2**i - at)).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        values += [s * float(np.float32(10.0 ** (i - 6)) * m) for m in middles for s in (1, -1)]
    return tuple(sorted(values))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(Format(f"int{b}", b, "int", 2 ** (b - 1) - 1) for b in (2, 3, 4, 5, 6)),
        Format("int8", 8, "int", 127, storage="int8"),
        Format("e4m3", 8, "float", 448.0, storage="float8_e4m3fn", emax=8),
        Format("e5m2", 8, "float", 57344.0, storage="float8_e5m2", emax=15),
        Format("e2m1", 4, "codebook", 6.0, codebook=_symmetric(_E2M1), emax=2),
        Format("nf4", 4, "codebook", 1.0, codebook=_NF4, ties="lower"),
        Format("fp4", 4, "codebook", 1.0, codebook=_symmetric(_FP4), ties="away"),
        *(_higgs(bits, dims) for dims in (1, 2) for bits in (2, 3, 4)),
        Format("dynamic8", 8, "codebook", 1.0, codebook=_dynamic_map(), ties="lower"),
    )
}


@functools.cache
def codebook_thresholds(name: str) -> tuple[np.ndarray, np.ndarray]:
    """How to round to the nearest entry of a codebook format.

    Returns:
      `(thresholds, codes)`, float32 `[n-1]` and uint8 `[n]`: a value with `i` thresholds at or below it (float32) has
      the code `codes[i]`. The format's `ties` are built in: a threshold that is a midpoint exactly belongs to the
      upper neighbour or, raised by one unit in the last place, to the lower one.
    """
    row, book = FORMATS[name], FORMATS[name].codebook
    assert book is not None, name
    # Of two codes with one value (+0 and -0) the lower is the one that encoding gives.
    codes = sorted(
        {v: c for c, v in reversed(list(enumerate(book)))}.values(),
        key=lambda c: book[c],
    )
    values = np.array([book[c] for c in codes], np.float32).astype(np.float64)
    middles = (values[:-1] + values[1:]) / 2
    up = {
        "lower": np.zeros(len(middles), bool),
        "away": middles >= 0,
        "even": np.array([c % 2 == 0 for c in codes[1:]]),
    }[row.ties]
    rounded = middles.astype(np.float32)
    above = np.nextafter(rounded, np.float32(np.inf))
    exact = rounded.astype(np.float64) == middles
    below = rounded.astype(np.float64) < middles
    thresholds = np.where((exact & ~up) | below, above, rounded)
    return thresholds, np.array(codes, np.uint8)
