"""Scheme: what is to be done to a weight, and to x on its way in, as data; `qjax.schemes` makes them."""

import dataclasses
from typing import Literal

from qjax.formats import FORMATS, Format


@dataclasses.dataclass(frozen=True)
class Delayed:
    """A static scale that layers keep up to date from what they met before (`qjax.delayed`).

    Attributes:
      history: how many calls are remembered.
      margin: the range is `2^margin` times the largest magnitude.
      amax: of those remembered the largest ("max"), or that of the last call ("most_recent").
    """

    history: int = 1024
    margin: int = 0
    amax: Literal["max", "most_recent"] = "max"


@dataclasses.dataclass(frozen=True)
class Activation:
    """How x is quantized before the product.

    Attributes:
      format: `int8` or `e4m3`.
      granularity: one scale a `token` (row of x), for the whole `tensor`, or for each `block` of 128 along K.
      mode: `dynamic` (from x itself) or `static` (the QTensor's `act_scale`; per tensor).
      outliers: columns where some row's magnitude reaches this leave x and are multiplied as they are, up to a 64th of
        K (`qjax.outliers`); None for none.
      delayed: where the static scale comes from while a model trains; None leaves it as it is.
    """

    format: Literal["int8", "e4m3"]
    granularity: Literal["token", "tensor", "block"] = "token"
    mode: Literal["dynamic", "static"] = "dynamic"
    outliers: float | None = None
    delayed: Delayed | None = None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a QTensor's arrays mean. Hashable, so that it can be static under `jit`.

    Attributes:
      spec: the command-line string, `w4a16:group_size=128`.
      weight: a row of `qjax.formats.FORMATS`.
      block: `(block_n, block_k)`, the rows and columns of `[N, K]` that share a scale; None is the whole axis.
      scale_dtype: dtype of new scales; `float8_e8m0fnu` makes them powers of two (MX).
      symmetric: integers only: whether zero points are left out.
      global_scale: whether block scales are relative to one of the tensor (NVFP4).
      nested: block of double quantization of the scales, in scales; None for none.
      activation: how x is quantized; None leaves it alone.
      hadamard: size of the blocks of K that are rotated, of x as of the weight (`qjax.hadamard`); None for none.
    """

    spec: str
    weight: str
    block: tuple[int | None, int | None] = (1, None)
    scale_dtype: str = "float32"
    symmetric: bool = True
    global_scale: bool = False
    nested: int | None = None
    activation: Activation | None = None
    hadamard: int | None = None

    @property
    def format(self) -> Format:
        """The weight's element format."""
        return FORMATS[self.weight]

    @property
    def bits(self) -> int:
        """Bits of a stored code, scales not counted."""
        return self.format.bits

    @property
    def is_plain(self) -> bool:
        """Whether a value is an integer times one scale: no zero point, no second level."""
        return self.format.kind == "int" and self.symmetric

    @property
    def is_static(self) -> bool:
        """Whether x is quantized by a scale that is known beforehand, the QTensor's `act_scale`."""
        return self.activation is not None and self.activation.mode == "static"

    def __str__(self) -> str:
        return self.spec
