"""HQQ folders, as transformers saves them: 1 to 8 bits with real-valued zero points, groups along either axis.

    .W_q             uint8 (int32 at 3 bits), the codes of a matrix [R, C] packed along R in slabs: word row r holds row
                     r in its highest bits, row r + R/c below it, ... (c codes a word)
    .scale, .zero    float: [R, 1] for axis 1, [1, C] for axis 0
    .shape           int64 [2], N and K; .nbits, .group_size, .axis: int32

    w = ((codes - zero) * scale).reshape(N, K)

The matrix is [N, K] flattened, then [N*K/g, g] for axis 1 (a group is g neighbours) and [g, N*K/g] for axis 0 (a group
is every (N*K/g)-th element, over rows: every (N/g)-th row shares, at each column, a scale and a zero point). Groups of
axis 0 are no blocks of neighbouring rows and columns: each weight gets a scale and a zero point of its own, which is
exact, and larger than the codes.
Sources: mobiusml/hqq `hqq/core/{quantize,bitpack,utils}.py`.
"""

import math

import numpy as np

from qjax.checkpoints.codes import Bytes
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.grouped import int_scheme
from qjax.checkpoints.packed import Packed, host_tensor
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

# nbits -> (codes a word, bits a code takes in it, dtype of the words).
PACKINGS = {
    1: (8, 1, "uint8"),
    2: (4, 2, "uint8"),
    3: (10, 3, "int32"),
    4: (2, 4, "uint8"),
    5: (1, 8, "uint8"),
    6: (1, 8, "uint8"),
    8: (1, 8, "uint8"),
}
CODE_TENSOR = "W_q"
ACROSS = "{} weights in groups of axis 0: each weight has a scale and a zero point of its own, which is large"

# What the writer remembers of itself; the values of the first two would change the meaning of the others.
REFUSED = ("quant_scale", "quant_zero", "view_as_float")
REMARKS = (
    "packing",
    "unpack_view_dtype",
    "compute_dtype",
    "channel_wise",
    "optimize",
    "round_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
)


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of an HQQ folder; a module's own tensors say its bits, group size and axis.

    Raises:
      CheckpointError: from the reader: a tensor that is missing, or that disagrees with the others; scales that are
        quantized themselves.
    """

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        if CODE_TENSOR not in tensors:
            return None
        return _weight(tensors), tuple(tensors.names)

    modules = [name.removesuffix(f".{CODE_TENSOR}") for name in files if name.endswith(f".{CODE_TENSOR}")]
    axes = [f"{module}.axis" for module in modules]
    across = [name for name in axes if name in files and files.shape(name) in ((), (1,)) and not files[name].any()]
    return Source(read, (CODE_TENSOR,), notes=(ACROSS.format(len(across)),) if across else ())


def _weight(tensors: ModuleTensors) -> QTensor:
    for name in (*REFUSED, *REMARKS):
        if name in tensors:
            value = tensors.take(name, ("uint8", "int32", "bool"))
            if name in REFUSED and value.any():
                raise CheckpointError(f"{tensors.where(name)}: {value.tolist()}; expected 0: such weights are not read")
    bits = _number(tensors, "nbits", tuple(PACKINGS))
    axis = _number(tensors, "axis", (0, 1))
    shape = tensors.take("shape", ("int64", "int32"), (2,))
    n, k = (int(size) for size in shape)
    if "group_size" in tensors:
        size = int(tensors.take_one("group_size", ("int32", "int64")))
    else:
        size = k if axis == 1 else n
    if n < 1 or k < 1 or size < 1 or n * k % size:
        raise CheckpointError(f"{tensors.where('shape')}: [{n}, {k}] in groups of {size}; groups have to divide it")
    rows, columns = (n * k // size, size) if axis == 1 else (size, n * k // size)
    codes = _codes(tensors, bits, rows, columns).reshape(n, k)
    per_group = (rows, 1) if axis == 1 else (1, columns)
    scale = tensors.take("scale", SCALES, per_group).reshape(-1)
    zero = tensors.take("zero", SCALES, per_group).reshape(-1)
    if axis == 1:
        block = math.gcd(k, size)
        group = np.arange(n * k // block) * block // size
    else:
        block = 1
        group = np.arange(n * k) % columns
    stored = max(bits, 2)
    scheme = int_scheme(stored, block, symmetric=False, scale_dtype=scale.dtype.name)
    return host_tensor(
        Packed(Bytes(codes), stored),
        scale[group].reshape(n, -1),
        _zero_point(zero, stored)[group].reshape(n, -1),
        scheme=scheme,
        k=k,
    )


def _number(tensors: ModuleTensors, name: str, allowed: tuple[int, ...]) -> int:
    value = int(tensors.take_one(name, ("int32", "int64")))
    if value not in allowed:
        raise CheckpointError(f"{tensors.where(name)}: {value}; expected one of {', '.join(map(str, allowed))}")
    return value


def _codes(tensors: ModuleTensors, bits: int, rows: int, columns: int) -> np.ndarray:
    """The codes of the matrix, uint8 `[rows, columns]`; rows that fill up the last slab are dropped."""
    each, width, dtype = PACKINGS[bits]
    slab = -(-rows // each)
    packed = tensors.take(CODE_TENSOR, (dtype,), (slab, columns), note=f"for {rows} rows of {bits}-bit codes")
    words = packed.view(f"u{packed.itemsize}")
    shifts = (width * np.arange(each - 1, -1, -1)).astype(words.dtype)
    codes = (words >> shifts[:, None, None]) & words.dtype.type(2**width - 1)
    return codes.astype(np.uint8).reshape(-1, columns)[:rows]


def _zero_point(zero: np.ndarray, bits: int) -> np.ndarray:
    """Zero points in the domain of stored codes: int8 where all of them are such integers, else as the file has them.

    Those of 8 bits are shifted by 128, in float32: a narrower type would round.
    """
    shifted = zero.astype(np.float32) - np.float32(128) if bits == 8 else zero
    if np.array_equal(shifted, np.round(shifted)) and np.abs(shifted.astype(np.float32)).max() <= 127:
        return shifted.astype(np.int8)
    return shifted
