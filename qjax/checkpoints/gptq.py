"""GPTQ folders (AutoGPTQ, GPTQModel): 2, 3, 4 and 8 bits, versions 1 and 2, act-order, overrides by module.

    .qweight   int32 [K*b/32, N]    each column an LSB-first stream along K
    .qzeros    int32 [G, N*b/32]    each row an LSB-first stream along N; version 1 stores the zero point minus one
    .scales    float [G, N]
    .g_idx     int32 [K]            group of each input; may be missing

    w[k, n] = (code[k, n] - zero_point[g_idx[k], n]) * scale[g_idx[k], n]

Sources: ModelCloud/GPTQModel `nn_modules/qlinear/__init__.py`, `utils/model.py`, `quantization/config.py`.
"""

import numpy as np

from qjax.checkpoints.codes import WORD, Stream, every
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.grouped import group_count, groups_of, int_weight, without_middle
from qjax.checkpoints.packed import to_zero_point
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source, matches
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
INTEGERS = ("int32", "uint32")
CODE_TENSOR = "qweight"
GROUP_SIZE = 128  # of a config that has none, as transformers' `GPTQConfig`

# Names that configs had before these.
ALIASES = {"w_bit": "bits", "q_group_size": "group_size", "format": "checkpoint_format"}


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of a GPTQ folder.

    Raises:
      CheckpointError: settings that no such folder has, or of a variant that is not read here; from the reader itself,
        a tensor that is missing or disagrees with them.
    """
    settings = _renamed(settings)
    if settings.get("is_marlin_format"):
        raise settings.error("is_marlin_format", "false: weights repacked for a kernel are not read")
    settings.one_of("pack_dtype", ("int32",), "int32")
    overrides = _overrides(settings)
    _check(settings)

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        own = _settings_of(prefix, settings, overrides)
        if CODE_TENSOR not in tensors:
            return None
        if own is None:
            raise CheckpointError(
                f"{tensors.where(CODE_TENSOR)}: {settings.where}.dynamic leaves {prefix} out, "
                "and the file has it quantized"
            )
        return _weight(tensors, own), tuple(tensors.names)

    version = settings.get("version")  # some tools' name for the kernels to use
    notes = () if version is None else (f"version={version!r}: checkpoint_format says how zero points are stored",)
    return Source(read, (CODE_TENSOR,), notes=notes)


def _renamed(settings: Settings) -> Settings:
    values = dict(settings.values)
    for old, new in ALIASES.items():
        if old in values:
            values.setdefault(new, values[old])
    return Settings(values, settings.where)


def _check(settings: Settings) -> None:
    settings.one_of("checkpoint_format", VERSIONS, "gptq")
    _bits(settings)
    settings.group_size(GROUP_SIZE)
    settings.flag("sym", True)
    settings.flag("desc_act")


def _bits(settings: Settings) -> int:
    bits: int = settings.one_of("bits", BITS)
    return bits


def _overrides(settings: Settings) -> dict[str, Settings | None]:
    """Regular expression -> settings of the modules it matches, or None for those left alone; excluding ones first."""
    table = settings.part("dynamic")
    if table is None:
        return {}
    found: dict[str, Settings | None] = {}
    for key in sorted(table.values, key=lambda key: not key.startswith("-:")):
        changes = table.part(key)
        if key.startswith("-:"):
            found[key[2:]] = None
        elif changes is not None:
            own = settings.but(**_renamed(changes).values)
            own.where = f"{table.where}[{key!r}]"
            _check(own)
            found[key.removeprefix("+:")] = own
    return found


def _settings_of(prefix: str, settings: Settings, overrides: dict[str, Settings | None]) -> Settings | None:
    """Those of the first pattern that matches; the folder's where none does."""
    where = f"{settings.where}.dynamic"
    return next((own for pattern, own in overrides.items() if matches(pattern, prefix, where)), settings)


def _weight(tensors: ModuleTensors, settings: Settings) -> QTensor:
    bits, size = _bits(settings), settings.group_size(GROUP_SIZE)
    rows, n = _rows_and_columns(tensors, bits)
    k = rows * WORD // bits
    qweight = tensors.take("qweight", INTEGERS, (rows, n))
    act_order = f"{settings.where}: desc_act=true" if settings.flag("desc_act") else None
    groups = groups_of(tensors, "g_idx", k, size, act_order=act_order)
    count = group_count(k, size)
    note = f"for K={k} in groups of {size or k}"
    scales = tensors.take("scales", SCALES, (count, n), note=_group_note(tensors, k, note))
    zeros = tensors.take("qzeros", INTEGERS, (count, n * bits // WORD), note=note)
    zero_point: np.ndarray | None = _zero_points(zeros.view(np.uint32), n, settings)
    if settings.flag("sym", True):
        zero_point = without_middle(zero_point, bits)
    codes = Stream(qweight.view(np.uint32).T, bits, k)
    return int_weight(codes, scales.T, zero_point, bits=bits, groups=groups)


def _rows_and_columns(tensors: ModuleTensors, bits: int) -> tuple[int, int]:
    """Shape that the codes should have: by the lengths of `g_idx` and `scales` where they are there."""
    shape = tensors.shape("qweight")
    where = tensors.where("qweight")
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{where}: shape {list(shape)}; expected [K * {bits} / 32, N]")
    rows, n = shape
    if "g_idx" in tensors and len(tensors.shape("g_idx")) == 1:
        rows = tensors.shape("g_idx")[0] * bits // WORD
    if "scales" in tensors and len(tensors.shape("scales")) == 2:
        n = tensors.shape("scales")[1]
    if shape != (rows, n):
        raise CheckpointError(f"{where}: shape {list(shape)}; expected {[rows, n]} at {bits} bits")
    if rows * WORD % bits or n * bits % WORD:
        raise CheckpointError(f"{where}: shape {list(shape)} holds no whole words of {bits}-bit codes along K and N")
    return rows, n


def _group_note(tensors: ModuleTensors, k: int, note: str) -> str:
    """Why the scales should have another shape, and which group size the file would have."""
    shape = tensors.shape("scales")
    if len(shape) == 2 and 0 < shape[0] <= k:
        return f"{note}; {shape[0]} groups would be of {-(-k // shape[0])}"
    return note


def _zero_points(words: np.ndarray, n: int, settings: Settings) -> np.ndarray:
    """uint32 `[G, N*b/32]` -> int8 `[N, G]`.

    Version 1 took one from whole words, so that a field borrowed from the next; adding one to whole words gives it
    back. Fields of 3 bits straddle words, and were changed one by one.
    """
    bits = _bits(settings)
    first = settings.get("checkpoint_format", "gptq") == "gptq"
    if first and WORD % bits == 0:
        words = words + np.uint32((2**WORD - 1) // (2**bits - 1))
    fields = every(Stream(words, bits, n))
    if first and WORD % bits:
        fields = (fields + np.uint8(1)) & np.uint8(2**bits - 1)
    return to_zero_point(fields, bits)
