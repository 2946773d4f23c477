"""bitsandbytes folders: NF4 and FP4, with and without double quantization, and LLM.int8.

    4 bits   .weight                uint8 [N*K/2, 1] (or the same bytes as another dtype): [N, K] flattened, high nibble
                                    first
             .weight.absmax         float32 [ceil(N*K/blocksize)]; double: uint8
             .weight.quant_map      float32 [16]
             .weight.quant_state.bitsandbytes__nf4 (or __fp4): uint8, JSON
             .weight.nested_absmax, .weight.nested_quant_map   float32 [ceil(blocks/256)], [256]; double only
    8 bits   .weight int8 [N, K], .SCB float32 [N], .weight_format uint8 (0, rows)

    w.flat[i] = quant_map[code_i] * absmax[i // blocksize]
    absmax[j] = nested_quant_map[c_j] * nested_absmax[j // 256] + nested_offset      (double)
    w[n, k] = code * SCB[n] / 127

Blocks run over the flattened matrix: where they cross rows, smaller ones with scales repeated say the same. A double
quantized absmax stays so where its own blocks are whole rows of ours, else it is float32.
Sources: bitsandbytes-foundation/bitsandbytes `functional.py` (QuantState), `nn/modules.py`.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.checkpoints.codes import Bytes, Stream, as_words
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.grouped import int_scheme
from qjax.checkpoints.packed import Packed, host_tensor
from qjax.checkpoints.source import ModuleTensors, Settings, Source
from qjax.errors import CheckpointError
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.schemes import FP4, NF4, Scheme

STATES = {f"weight.quant_state.bitsandbytes__{name}": make for name, make in {"nf4": NF4, "fp4": FP4}.items()}
STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32")
INT8_SCALE = "SCB"
OUTLIERS = "llm_int8_threshold: inputs are left as they are; LLM.int8 rounds all but outliers to int8"


@dataclass(frozen=True)
class State:
    """What the JSON beside a 4-bit weight says."""

    shape: tuple[int, int]
    block: int
    nested_block: int | None
    nested_offset: float

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-math.prod(self.shape) // self.block)


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of a bitsandbytes folder; which of its formats a module is in, its tensors say.

    Raises:
      CheckpointError: from the reader: a tensor or a key that is missing, or that disagrees with the others.
    """

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        if INT8_SCALE in tensors:
            return _int8(tensors), tuple(tensors.names)
        name = next((name for name in STATES if name in tensors), None)
        if name is None:
            return None
        return _four_bits(tensors, name), tuple(tensors.names)

    return Source(read, (INT8_SCALE, *STATES), notes=(OUTLIERS,) if settings.get("load_in_8bit") is True else ())


def _int8(tensors: ModuleTensors) -> QTensor:
    codes = tensors.take("weight", ("int8",), (None, None))
    n, k = codes.shape
    largest = tensors.take(INT8_SCALE, ("float32", "float16"), (n,))
    if "weight_format" in tensors:
        order = tensors.take_one("weight_format", ("uint8",))
        if order.item() != 0:
            where = tensors.where("weight_format")
            raise CheckpointError(f"{where}: {order.item()}; expected 0 (rows): orders of one kind of GPU are not read")
    scale = largest.astype(np.float32)[:, None] * np.float32(1 / 127)
    scheme = int_scheme(8, None, symmetric=True, scale_dtype="float32")
    return host_tensor(codes, scale, scheme=scheme, k=k)


def _four_bits(tensors: ModuleTensors, state_name: str) -> QTensor:
    state = _state(tensors, state_name)
    n, k = state.shape
    packed = _codes(tensors, n, k)
    size = math.gcd(k, state.block)  # a block of ours lies in one of theirs
    scale: np.ndarray | QTensor = _scales(tensors, state, size)
    scheme = STATES[state_name](block_size=size, double_quant=isinstance(scale, QTensor))
    if isinstance(scale, QTensor):
        scheme = dataclasses.replace(scheme, nested=state.nested_block)
    return host_tensor(
        packed,
        scale,
        codebook=_table(tensors, "weight.quant_map", scheme.weight),
        scheme=scheme,
        k=k,
    )


def _state(tensors: ModuleTensors, name: str) -> State:
    raw = tensors.take(name, ("uint8",), (None,))
    where = tensors.where(name)
    try:
        fields = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where}: {type(fields).__name__}; expected a JSON object")
    given = Settings(fields, where)
    given.one_of("quant_type", (name.rpartition("__")[2],))
    shape = given.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        raise given.error("shape", "two positive integers, N and K")
    nested = given.count("nested_blocksize") if "nested_blocksize" in given else None
    offset = given.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise given.error("nested_offset", "a finite number")
    return State((shape[0], shape[1]), given.count("blocksize"), nested, float(offset))


def _codes(tensors: ModuleTensors, n: int, k: int) -> Packed:
    """`QTensor.packed` of the nibbles."""
    stored = tensors.raw("weight", STORAGE)
    if stored.nbytes != -(-n * k // 2):
        raise CheckpointError(
            f"{tensors.where('weight')}: {stored.nbytes} bytes; its quant_state says [{n}, {k}], which takes "
            f"{-(-n * k // 2)}"
        )
    flat = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    if k % 2 == 0:
        return Packed(Stream(as_words(flat.reshape(n, -1)), 4, k, first="high"), 4)
    codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)[: n * k]  # rows begin in the middle of a byte
    return Packed(Bytes(codes.reshape(n, k)), 4)


def _table(tensors: ModuleTensors, name: str, form: str) -> np.ndarray | None:
    """A table of the file, or None where it is the format's own."""
    own = np.array(FORMATS[form].codebook, np.float32)
    table = tensors.take(name, ("float32",), own.shape)
    return None if np.array_equal(table, own) else table


def _scales(tensors: ModuleTensors, state: State, size: int) -> Any:
    """Scales `[N, K/size]`."""
    n, k = state.shape
    name = "weight.absmax"
    if state.nested_block is None:
        return _spread(tensors.take(name, ("float32",), (state.blocks,)), state, size)
    codes = tensors.take(name, ("uint8",), (state.blocks,))
    largest = tensors.take("weight.nested_absmax", ("float32",), (-(-state.blocks // state.nested_block),))
    table = _table(tensors, "weight.nested_quant_map", "dynamic8")
    scheme = _nested_scheme(k // size, state.nested_block) if size == state.block else None
    if scheme is None:
        values = np.array(FORMATS["dynamic8"].codebook, np.float32) if table is None else table
        spread = np.repeat(largest, state.nested_block)[: state.blocks]
        return _spread(values[codes] * spread + np.float32(state.nested_offset), state, size)
    return host_tensor(
        codes.reshape(n, -1),
        largest.reshape(-1, 1) if scheme.block[1] is None else largest.reshape(n, -1),
        codebook=table,
        offset=np.array(state.nested_offset, np.float32),
        scheme=scheme,
        k=1,
    )


def _nested_scheme(columns: int, block: int) -> Scheme | None:
    """That of scales in rows of `columns`; None where the blocks over them are neither whole rows nor lie in one."""
    spec = f"dynamic8:block={block}"
    if block % columns == 0:
        return Scheme(spec=spec, weight="dynamic8", block=(block // columns, None))
    return Scheme(spec=spec, weight="dynamic8", block=(1, block)) if columns % block == 0 else None


def _spread(scales: np.ndarray, state: State, size: int) -> np.ndarray:
    """Scales of blocks over the flattened matrix -> those of blocks of `size` in each row."""
    n, k = state.shape
    if size == state.block:
        return scales.reshape(n, -1)
    return scales[np.arange(n * k // size) * size // state.block].reshape(n, -1)
