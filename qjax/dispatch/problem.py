"""Problem: one quantized product as dispatch sees it. Static and hashable; no arrays."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qjax.schemes import Scheme

# What a tensor may carry beyond codes and scales; a kernel says which of these it understands.
FEATURES = frozenset(
    {
        "zero_point",  # integer zero points, int8
        "zero_point_real",  # zero points that are no integers (HQQ)
        "codebook",  # a table other than the format's own
        "points",  # a table of points, which several neighbours name together
        "offset",  # added after scaling (bitsandbytes' nested scales)
        "global_scale",  # a second level of scale (NVFP4)
        "nested_scale",  # scales that are quantized themselves
        "input_perm",  # act-order: x is permuted before the product
        "padded_pieces",  # K stored as several pieces, each padded to whole groups
        "pieces_cut_groups",  # pieces padded to no whole number of groups
    }
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y[m, n] = activation(x[m, k] @ w[k, n] + bias[n]) + residual[m, n]`, `batch` times over.

    Attributes:
      m, n, k: rows of x, output features, input features. `m` may be zero.
      scheme: what the weight's arrays mean.
      scale_dtype: of the scales; of their codes where scales are themselves quantized.
      x_dtype, out_dtype: of the arrays.
      bias, residual: whether there is one.
      activation: name of the function in the epilogue.
      batch: stacked weights, each with its own m rows of x.
      transposed: the product runs over n: `x[m, n] @ w[k, n].T`, as gradients with respect to x do.
      features: the members of `FEATURES` that the tensor has.
    """

    m: int
    n: int
    k: int
    scheme: "Scheme"
    scale_dtype: np.dtype = np.dtype("float16")
    x_dtype: np.dtype = np.dtype("float32")
    out_dtype: np.dtype = np.dtype("float32")
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    batch: int = 1
    transposed: bool = False
    features: frozenset[str] = frozenset()

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of `[N, K]` that share a scale."""
        block_n, block_k = self.scheme.block
        return block_n or self.n, block_k or self.k

    @property
    def x_format(self) -> str | None:
        """To what x is quantized; None where it is left as it is, as the vectors of transposed products are."""
        activation = None if self.transposed else self.scheme.activation
        return activation.format if activation else None

    @property
    def x_granularity(self) -> str | None:
        """What a scale of quantized x covers: a token, the tensor or a block of 128 along K."""
        activation = None if self.transposed else self.scheme.activation
        return activation.granularity if activation else None

    def with_float_x(self) -> "Problem":
        """The product that a kernel sees which does not quantize x: codes in a float, one scale a row left for later.

        Codes of 8 bits are exact in all floats; what follows the product waits for the scale of x.
        """
        scheme = dataclasses.replace(self.scheme, activation=None)
        x_dtype = np.dtype("float16" if self.out_dtype == np.float16 else "bfloat16")
        return dataclasses.replace(
            self, scheme=scheme, x_dtype=x_dtype, out_dtype=np.dtype("float32"), bias=False, activation=None,
            residual=False,
        )  # fmt: skip

    @property
    def shape(self) -> str:
        """`1 x 4096 x 22016`: m, k, n, after the batch where there is one."""
        batch = f"{self.batch} * " if self.batch > 1 else ""
        return f"{batch}{self.m} x {self.k} x {self.n}" + (" transposed" if self.transposed else "")

    def __str__(self) -> str:
        extras = [self.activation, "bias" * self.bias, "residual" * self.residual]
        words = [self.shape, str(self.scheme), f"{self.x_dtype} -> {self.out_dtype}"]
        words += [f"+{word}" for word in [*extras, *sorted(self.features)] if word]
        return " ".join(words)
