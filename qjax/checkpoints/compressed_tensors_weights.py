"""The weights of compressed-tensors: one function a format, its tensors -> QTensor.

    pack-quantized         .weight_packed int32 [N, words] an LSB-first stream along K, .weight_shape int64 [2] = N, K,
                           .weight_zero_point int32 [words of N, G], packed along N; .weight_g_idx (actorder group)
    int-quantized, naive-quantized   .weight int8 [N, K], .weight_zero_point int8 like the scales
    float-quantized        .weight float8_e4m3fn [N, K]
    nvfp4-pack-quantized   .weight_packed uint8 [N, K/2] low nibble first, .weight_scale e4m3 [N, K/16],
                           .weight_global_scale float32 [1], by which weights are divided
    mxfp4-pack-quantized   the same nibbles, .weight_scale uint8 [N, K/32] (e8m0)
    mxfp8-quantized        .weight float8_e4m3fn [N, K], .weight_scale uint8 [N, K/32] (e8m0)

    w = (code - zero_point) * scale, integer codes signed (packed ones with 2^(b-1) added)

Widths of 3, 5, 6 and 7 bits are packed in two ways: whole codes a word, top bits unused (before 0.18), or densely.
The number of words tells which; where both give the same number, the version does.
Sources: vllm-project/compressed-tensors `compressors/{pack_quantized,nvfp4,mxfp4,naive_quantized}`, `mx_utils.py`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qjax.checkpoints.codes import PACKINGS, Bytes, Packing, Stream, as_words, every, word_count
from qjax.checkpoints.grouped import group_count, groups_of, int_weight, without_middle
from qjax.checkpoints.packed import Packed, host_tensor, to_zero_point
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor
from qjax.schemes import FP8, MXFP4, MXFP8, NVFP4, Scheme

DENSE_SINCE = (0, 18)
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclass(frozen=True)
class Arguments:
    """`weights` of a group: type, bits, and what a scale covers."""

    kind: str
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    block: tuple[int, int] | None
    act_order: str | None
    where: str

    @classmethod
    def of(cls, given: Settings) -> "Arguments":
        """Checked one by one; what a format can do with them is checked where a weight is read."""
        kind = given.one_of("type", ("int", "float"), "int")
        strategy = given.one_of("strategy", STRATEGIES, "tensor" if "group_size" not in given else "group")
        size = given.group_size() if strategy in ("group", "tensor_group") else None
        block = given.get("block_structure")
        if isinstance(block, str):  # "128x128" of old versions
            block = [int(side) if side.isdecimal() and side.isascii() else 0 for side in block.split("x")]
        if strategy == "block":
            if not isinstance(block, list) or len(block) != 2 or any(type(b) is not int or b < 1 for b in block):
                raise given.error("block_structure", "two positive integers")
            block = (block[0], block[1])
        bits = given.one_of("num_bits", range(2, 9), 8)
        block = block if strategy == "block" else None
        # "weight" and "static" have changed the order while quantizing and changed it back.
        order = given.get("actorder")
        act_order = f"{given.where}: actorder={order!r}" if order in ("group", "dynamic", True) else None
        return cls(kind, bits, strategy, size, given.flag("symmetric", True), block, act_order, given.where)

    def check(self, form: str) -> None:
        """Raises CheckpointError where the format `form` has no weights like these."""
        row = WEIGHTS[form]
        if (self.kind, self.bits, self.strategy) not in row.allowed():
            kinds = ", ".join(row.kinds)
            bits = ", ".join(map(str, row.bits))
            raise CheckpointError(
                f"{self.where}: type={self.kind}, num_bits={self.bits}, strategy={self.strategy}; the format {form} is "
                f"read with type {kinds}, num_bits {bits}, strategy {', '.join(row.strategies)}"
            )


def _pack_quantized(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    bits = arguments.bits
    packed = tensors.take("weight_packed", ("int32", "uint32"), (None, None))
    n, k = _stated_shape(tensors, packed.shape, bits)
    packing = _packing(tensors, "weight_packed", packed.shape[1], k, bits, version)
    groups = groups_of(tensors, "weight_g_idx", k, arguments.group_size, act_order=arguments.act_order)
    scale = _row_scales(tensors, arguments, n, group_count(k, arguments.group_size))
    zero_point = _packed_zero_points(tensors, scale.shape, bits, version)
    if arguments.symmetric:
        zero_point = without_middle(zero_point, bits)
    return int_weight(
        Stream(packed.view(np.uint32), bits, k, packing),
        scale,
        zero_point,
        bits=bits,
        groups=groups,
    )


def _stated_shape(tensors: ModuleTensors, packed: tuple[int, ...], bits: int) -> tuple[int, int]:
    """N and K of `.weight_shape`, if the packed words can be of that shape."""
    stated = tensors.take("weight_shape", ("int64", "int32"), (2,))
    n, k = (int(size) for size in stated)
    if n != packed[0] or k < 1 or packed[1] not in (word_count(k, bits, p) for p in PACKINGS):
        raise CheckpointError(
            f"{tensors.where('weight_shape')}: says {[n, k]}, and weight_packed has shape {list(packed)}, which "
            f"holds no such weight at {bits} bits"
        )
    return n, k


def _packing(tensors: ModuleTensors, suffix: str, words: int, length: int, bits: int, version: str) -> Packing:
    found = [packing for packing in PACKINGS if word_count(length, bits, packing) == words]
    if not found:
        raise CheckpointError(f"{tensors.where(suffix)}: {words} words hold no {length} codes of {bits} bits")
    if len(found) == 1:
        return found[0]
    parts = version.split(".")[:2]
    numbers = tuple(int(part) if part.isdecimal() and part.isascii() else 0 for part in parts)
    return "padded" if numbers < DENSE_SINCE else "dense"


def _row_scales(tensors: ModuleTensors, arguments: Arguments, n: int, count: int) -> np.ndarray:
    """Scales `[N, G]`; one of the whole tensor is repeated for each row."""
    if arguments.strategy == "tensor":
        return np.broadcast_to(tensors.take_one("weight_scale", SCALES).reshape(1, 1), (n, 1))
    note = f"for strategy {arguments.strategy}" + (f", groups of {arguments.group_size}" if count > 1 else "")
    shape = (n,) if arguments.strategy == "channel" and len(tensors.shape("weight_scale")) == 1 else (n, count)
    return tensors.take("weight_scale", SCALES, shape, note=note).reshape(n, count)


def _packed_zero_points(tensors: ModuleTensors, shape: tuple[int, ...], bits: int, version: str) -> np.ndarray | None:
    """int8 `[N, G]`, from words packed along N, or (old files) from signed int8."""
    name = "weight_zero_point"
    if name not in tensors:
        return None
    n, count = shape
    if tensors.files.dtype(f"{tensors.prefix}.{name}") == np.int8:
        return _signed_zero_points(tensors, shape, bits)
    words = tensors.take(name, ("int32", "uint32"), (None, count))
    packing = _packing(tensors, name, words.shape[0], n, bits, version)
    return to_zero_point(every(Stream(words.view(np.uint32).T, bits, n, packing)), bits)


def _signed_zero_points(tensors: ModuleTensors, shape: tuple[int, ...], bits: int) -> np.ndarray | None:
    """int8 like the scales, signed in the file."""
    if "weight_zero_point" not in tensors:
        return None
    zeros = tensors.take("weight_zero_point", ("int8",))
    if zeros.size != 1 and zeros.size != shape[0] * shape[1]:
        raise CheckpointError(
            f"{tensors.where('weight_zero_point')}: shape {list(zeros.shape)}; expected {list(shape)}, as the scales"
        )
    wide = np.broadcast_to(zeros.reshape(1, 1) if zeros.size == 1 else zeros.reshape(shape), shape)
    _check_range(tensors, "weight_zero_point", wide, bits)
    return to_zero_point(wide.view(np.uint8) + np.uint8(2 ** (bits - 1)), bits)  # modulo 256


def _check_range(tensors: ModuleTensors, suffix: str, signed: np.ndarray, bits: int) -> None:
    """Refuses int8 values that are no signed codes of `bits`."""
    half = 2 ** (bits - 1)
    if bits < 8 and signed.size:
        low, high = int(signed.min()), int(signed.max())
        if not -half <= low <= high < half:
            raise CheckpointError(
                f"{tensors.where(suffix)}: values {low} to {high}; {bits} bits hold {-half} to {half - 1}"
            )


def _int_quantized(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    if arguments.kind == "float":  # naive-quantized
        return _float_quantized(tensors, arguments, version)
    codes = tensors.take("weight", ("int8",), (None, None))
    n, k = codes.shape
    groups = groups_of(tensors, "weight_g_idx", k, arguments.group_size, act_order=arguments.act_order)
    scale = _row_scales(tensors, arguments, n, group_count(k, arguments.group_size))
    zero_point = _signed_zero_points(tensors, scale.shape, arguments.bits)
    if arguments.symmetric:
        zero_point = without_middle(zero_point, arguments.bits)
    _check_range(tensors, "weight", codes, arguments.bits)
    as_stored = arguments.bits == 8 and groups.order is None
    stored = codes if as_stored else Bytes(codes.view(np.uint8), added=2 ** (arguments.bits - 1))
    return int_weight(stored, scale, zero_point, bits=arguments.bits, groups=groups)


def _float_quantized(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    codes = tensors.take("weight", ("float8_e4m3fn",), (None, None))
    n, k = codes.shape
    if "weight_zero_point" in tensors:  # zero in every file: floats have none
        tensors.take("weight_zero_point", (*SCALES, "int8", "float8_e4m3fn"))
    if arguments.strategy == "tensor":
        scale, scheme = tensors.take_one("weight_scale", SCALES).reshape(1, 1), FP8(granularity="tensor")
    elif arguments.block is None:
        scale, scheme = _row_scales(tensors, arguments, n, 1), FP8(granularity="channel")
    else:
        rows, columns = arguments.block
        note = f"for [{n}, {k}] in blocks of {rows} x {columns}"
        scale = tensors.take("weight_scale", SCALES, (-(-n // rows), -(-k // columns)), note=note)
        scheme = dataclasses.replace(FP8(granularity="block"), block=(rows, columns))
    scheme = dataclasses.replace(scheme, scale_dtype=scale.dtype.name)
    return host_tensor(codes, scale, scheme=scheme, k=k)


def _nvfp4(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    scheme = NVFP4()
    packed, k = _nibbles(tensors)
    scale = _block_scales(tensors, scheme, packed.shape[0], k, "float8_e4m3fn")
    tensors.finite("weight_scale", scale)
    level = tensors.take_one("weight_global_scale", SCALES).reshape(1, 1)
    if not level > 0:
        raise CheckpointError(
            f"{tensors.where('weight_global_scale')}: value {level.item()}; expected a positive number"
        )
    inverse = (1 / level.astype(np.float64)).astype(np.float32).reshape(())
    return host_tensor(
        _words(packed, k),
        scale,
        global_scale=inverse,
        scheme=scheme,
        k=k,
    )


def _mxfp4(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    scheme = MXFP4()
    packed, k = _nibbles(tensors)
    scale = _exponents(tensors, scheme, packed.shape[0], k)
    return host_tensor(_words(packed, k), scale, scheme=scheme, k=k)


def _mxfp8(tensors: ModuleTensors, arguments: Arguments, version: str) -> QTensor:
    scheme = MXFP8()
    codes = tensors.take("weight", ("float8_e4m3fn",), (None, None))
    scale = _exponents(tensors, scheme, *codes.shape)
    return host_tensor(codes, scale, scheme=scheme, k=codes.shape[1])


def _nibbles(tensors: ModuleTensors) -> tuple[np.ndarray, int]:
    """The bytes of a 4-bit float format, and K."""
    packed = tensors.take("weight_packed", ("uint8",), (None, None))
    return packed, packed.shape[1] * 2


def _words(packed: np.ndarray, k: int) -> Packed:
    """Bytes of nibbles, low first -> `QTensor.packed`."""
    return Packed(Stream(as_words(packed), 4, k), 4)


def _block_scales(tensors: ModuleTensors, scheme: Scheme, n: int, k: int, dtype: str) -> np.ndarray:
    size = scheme.block[1]
    return tensors.take("weight_scale", (dtype,), (n, group_count(k, size)), note=f"for K={k} in blocks of {size}")


def _exponents(tensors: ModuleTensors, scheme: Scheme, n: int, k: int) -> np.ndarray:
    """Scales in e8m0, which files have as bytes."""
    scale = _block_scales(tensors, scheme, n, k, "uint8").view(ml_dtypes.float8_e8m0fnu)
    tensors.finite("weight_scale", scale)
    return scale


@dataclass(frozen=True)
class Weights:
    """A format: what it can be asked for, the tensor that holds its codes, and what reads it."""

    read: Callable[[ModuleTensors, Arguments, str], QTensor]
    codes: str
    kinds: tuple[str, ...]
    bits: tuple[int, ...]
    strategies: tuple[str, ...]

    def allowed(self) -> set[tuple[str, int, str]]:
        """Every (type, bits, strategy) that it is read with."""
        floats = [("float", 8, "tensor"), ("float", 8, "channel"), ("float", 8, "block")]
        own = {(kind, bits, strategy) for kind in self.kinds for bits in self.bits for strategy in self.strategies}
        return own if self.kinds != ("int", "float") else {row for row in own if row[0] == "int"} | set(floats)


_ROWS = ("tensor", "channel", "group")

WEIGHTS = {
    "pack-quantized": Weights(_pack_quantized, "weight_packed", ("int",), tuple(range(2, 9)), _ROWS),
    "int-quantized": Weights(_int_quantized, "weight", ("int",), tuple(range(2, 9)), _ROWS),
    "naive-quantized": Weights(_int_quantized, "weight", ("int", "float"), tuple(range(2, 9)), _ROWS),
    "float-quantized": Weights(_float_quantized, "weight", ("float",), (8,), ("tensor", "channel", "block")),
    "nvfp4-pack-quantized": Weights(_nvfp4, "weight_packed", ("float",), (4,), ("tensor_group", "group")),
    "mxfp4-pack-quantized": Weights(_mxfp4, "weight_packed", ("float",), (4,), ("group", "tensor_group")),
    "mxfp8-quantized": Weights(_mxfp8, "weight", ("float",), (8,), ("group", "tensor_group")),
}
CODE_TENSORS = ("weight_packed",)

# Formats by the type of weights, for groups that don't state theirs.
FORMATS_OF_TYPE = {"int": ("pack-quantized", "int-quantized"), "float": ("nvfp4-pack-quantized", "float-quantized")}
